"""Masks of zeros that move during training: by what gradients sum up, or by dropping entries and growing others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.mask.entry_choice import largest
from trainc.runtime.mask.mask_actions import ChooseZeros, record_overlap
from trainc.runtime.mask.scores import SummedScores
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.gradients import as_dense
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Form, Record, Values

Growth = Callable[[Step, str, Tensor], Tensor]
"""Given the step, the name of a parameter and its dense gradient, a score of each entry: the largest grow."""


class SumScores(Action):
    """Phase 7: add up in every step what dense gradients say of entries, before masks change them."""

    phase = Phase.REDUCE

    def __init__(self, label: str, score: SummedScores, shapes: Mapping[str, Tensor]) -> None:
        self.name, self.score = f"{label} scores", score
        self._tensors = dict(shapes)

    def run(self, step: Step) -> None:
        found = {name: g for name in self._tensors if (g := step.parameters[name].grad) is not None}
        if found and all(bool(g.isfinite().all()) for g in map(as_dense, found.values())):
            self.score.add(step, found)

    def memory(self) -> int:
        """Return the bytes of the sums, in float32 at least."""
        return sum(t.numel() * self.score.dtype_of(t).itemsize for t in self._tensors.values())

    def state_dict(self) -> ActionState:
        return {f"sum/{name}": total for name, total in self.score.sums.items()}

    def state_form(self) -> Form:
        def form(tensor: Tensor) -> Form:
            dtype = str(self.score.dtype_of(tensor)).removeprefix("torch.")
            return Values(tensor.shape, dtype, finite=True)

        return Record(optional={f"sum/{name}": form(t) for name, t in self._tensors.items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = {key.partition("/")[2]: total for key, total in state.items()}
        if foreign := found.keys() - self._tensors.keys():
            raise ValueError(
                f"{self.name}: the checkpoint has scores of `{min(foreign)}`, which this clause does not select"
            )
        self.score.sums.clear()
        for name, total in found.items():
            self.score.sums[name] = total.to(self._tensors[name].device, copy=True)


class Regrow(Action):
    """Phase 7, at times of the clause and of `pace`: drop the smallest entries that train, let as many others train.

    `fraction` of each tensor's entries is dropped, rounded down. The dense gradient is read before masks change it. A
    new entry is 0, and the optimizer begins it as it begins a parameter. In this step it leaves the tensor as it is.
    """

    phase = Phase.REDUCE

    def __init__(
        self,
        label: str,
        choice: ChooseZeros,
        growth: Growth,
        fraction: Callable[[Clock], float],
        pace: Gate | None = None,
    ) -> None:
        self.label, self.name = label, f"{label} regrowth"
        self.choice, self.growth, self.fraction = choice, growth, fraction
        self.pace = pace
        self._noted = False

    def run(self, step: Step) -> None:
        if self.pace is not None and not self.pace.fires(step.clock):
            return
        fraction = self.fraction(step.clock)
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"{self.label}: the fraction of entries to replace is {fraction:g} at step {step.clock.steps}: expected"
                " 0 to 1"
            )
        overlap = {}
        self._note_none(step, fraction)
        for name, mask in self.choice.masks.items():
            grad, count = mask.parameter.grad, int(fraction * mask.count)
            if grad is None or mask.kept is None or not count or name in self.choice.fresh:
                continue
            dense = as_dense(grad)
            if not bool(dense.isfinite().all()):
                step.notes.append(
                    f"{self.label}: the gradient of `{name}` is not finite, so it is not regrown"
                )
                continue
            kept = mask.kept_entries()
            new = regrown(mask.parameter.detach(), kept, self.growth(step, name, dense), count)
            overlap[name] = int((kept & new).sum()), mask.count
            mask.choose(new, *step.optimizer_entries(name))
            mask.parameter.grad = None
            step.gradients = None
        record_overlap(step, self.label, overlap)

    def _note_none(self, step: Step, fraction: float) -> None:
        """Say, at the first time, where the fraction is less than one entry of each tensor: none is replaced."""
        waiting = self.choice.fresh
        counts = (mask.count for name, mask in self.choice.masks.items() if name not in waiting)
        most = max(counts, default=0)
        if self._noted or not most:
            return
        self._noted = True
        if fraction > 0 and int(fraction * most) == 0:
            step.notes.append(
                f"{self.label}: at most {most} entries of a tensor train, of which {fraction:.3g} is less than one, so"
                " none is replaced: select larger tensors, or replace more"
            )


def regrown(weight: Tensor, kept: Tensor, growth: Tensor, count: int) -> Tensor:
    """Return which entries train, bool, after `count` of those that do were dropped and as many others grown.

    Those with the smallest |w| are dropped; of all that do not train then, those with the largest `growth` grow. Of
    equal ones the lower position trains.
    """
    size = weight.abs().flatten().masked_fill(~kept.flatten(), -torch.inf)
    (staying,) = largest([size], int(kept.sum()) - count)
    mask = torch.zeros_like(size, dtype=torch.bool).index_fill_(0, staying, True)
    (grown,) = largest([growth.flatten().masked_fill(mask, -torch.inf)], count)
    return mask.index_fill_(0, grown, True).view(weight.shape)
