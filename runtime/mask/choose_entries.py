"""The choice of the entries that train, in a run: once or every so often, by weights or by gradients of some steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.mask.entry_choice import Choice
from trainc.runtime.mask.mask_actions import record_overlap
from trainc.runtime.mask.scores import Score, ScoredChoice, SummedScores
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Count, Flag, Form, Record, Values


class ChooseEntries(Action):
    """Chooses the entries that train when `window` fires first, and, where it has an `every`, each time.

    By scores of the weights they are chosen before the passes of the step (phase 3), by gradients after its update
    (phase 10), once `batches` steps have been summed (phase 8). Until a tensor's first choice it does not train; later
    its chosen entries go on training, and those that stay chosen keep what the optimizer has of them.
    `turns` are the actions of these phases, and this one is that of phase 8.
    """

    phase = Phase.GRADIENTS

    def __init__(
        self,
        label: str,
        selected: Sequence[SelectedEntries],
        score: Score | SummedScores,
        choice: Choice,
        density: float,
        window: Gate,
        batches: int = 1,
    ) -> None:
        self.label, self.name = label, f"{label} choice"
        self.selected = {entries.name: entries for entries in selected}
        self.score, self.choice, self.density, self.batches = score, choice, density, batches
        self.window, self.start = window, Gate(window.start)
        self.gate = (
            Gate()
        )  # the weights wait for `window` as well, so the action itself always runs
        self.due: set[str] = set()
        """The parameters whose entries are to be chosen as soon as they can be."""
        self.seen = dict.fromkeys(self.selected, 0)
        """How many steps each has summed."""
        self._overlap: dict[str, tuple[int, int]] = {}
        """How many entries stayed of those chosen again in this step, and how many were chosen, by parameter."""

    def turns(self) -> Iterator[Action]:
        """Return the actions by which this one acts, in the order of a step."""
        yield Turn(f"{self.label} due", Phase.PERTURB, self._begin)
        yield self
        if isinstance(self.score, SummedScores):
            yield Turn(f"{self.label} switch", Phase.DELTAS, self._end)

    def _begin(self, step: Step) -> None:
        """See what is due; choose it by the weights, or keep the gradients that the choice needs."""
        self._overlap = {}
        if self.start.fires(step.clock):
            self.due |= {name for name, one in self.selected.items() if not one.is_chosen}
        if self.window.every is not None and self.window.fires(step.clock):
            self.due |= set(self.selected)
        if not isinstance(self.score, SummedScores):
            for group in self._groups():
                names = [entries.name for entries in group]
                self._choose(step, ScoredChoice(self.label, names, self.score, self.choice))
            return
        for name, entries in self.selected.items():
            entries.keeps_dense = name in self.due

    def run(self, step: Step) -> None:
        """Follow weights that were set from outside, and sum the gradients of what is due."""
        found: dict[str, Tensor] = {}
        for name, entries in self.selected.items():
            entries.read()
            entries.gather()
            grad = entries.parameter.grad
            if grad is not None and name in self.due:
                found[name] = grad
            entries.parameter.grad = None
        if found and isinstance(self.score, SummedScores):
            self._add(self.score, step, found)

    def _add(self, score: SummedScores, step: Step, found: Mapping[str, Tensor]) -> None:
        dense = {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}
        if not torch.stack([g.isfinite().all() for g in dense.values()]).all():
            step.notes.append(f"{self.name}: a gradient is not finite, so this step is not counted")
            return
        score.add(step, dense)
        for name in self.due if self._joint else found:
            self.seen[name] += 1

    def _end(self, step: Step) -> None:
        """Choose what has seen enough steps."""
        assert isinstance(self.score, SummedScores)
        for group in self._groups():
            if all(self.seen[entries.name] >= self.batches for entries in group):
                names = [entries.name for entries in group]
                self._choose(step, ScoredChoice(self.label, names, self.score.take, self.choice))
                self.seen.update(dict.fromkeys(names, 0))

    def _groups(self) -> list[list[SelectedEntries]]:
        """Return what is due, in groups that are compared with each other."""
        due = [entries for name, entries in self.selected.items() if name in self.due]
        if self._joint:
            return [due] if due else []
        return [[entries] for entries in due]

    @property
    def _joint(self) -> bool:
        """Say whether what is chosen in a tensor depends on the others."""
        return self.choice.together or self.choice.allocate is not None

    def _choose(self, step: Step, choose: ScoredChoice) -> None:
        masks = choose(step, self.density)
        if masks is None:
            return
        for name, mask in masks.items():
            entries, index = self.selected[name], mask.flatten().nonzero()[:, 0]
            stayed = entries.choose(index, *step.optimizer_entries(name))
            if stayed is not None:
                self._overlap[name] = stayed, len(index)
            step.series.setdefault(f"{self.label}.density", {})[name] = entries.density
            entries.keeps_dense = False
        self.due.difference_update(masks)
        record_overlap(step, self.label, self._overlap)

    def memory(self) -> int:
        """Return the bytes held besides the weights."""
        sums = sum(tensor.numel() * tensor.element_size() for tensor in self._sums().values())
        return sums + sum(entries.memory() for entries in self.selected.values())

    def _sums(self) -> dict[str, Tensor]:
        return self.score.sums if isinstance(self.score, SummedScores) else {}

    def state_dict(self) -> ActionState:
        state: ActionState = {f"sum/{name}": tensor for name, tensor in self._sums().items()}
        state |= {f"seen/{name}": seen for name, seen in self.seen.items() if seen}
        for name, entries in self.selected.items():
            state |= entries.state()
            if entries.is_chosen and name in self.due:
                state[f"due/{name}"] = True
        return state

    def state_form(self) -> Form:
        found: dict[str, Form] = {}
        for name, entries in self.selected.items():
            whole = entries.parameter
            # How many there are is a matter of scores or of weights where shapes alone do not say it.
            length = entries.values.shape if self.choice.known else [None]
            integer = "int32" if whole.numel() <= torch.iinfo(torch.int32).max else "int64"
            found[f"seen/{name}"], found[f"due/{name}"] = Count(1), Flag()
            found[f"sum/{name}"] = Values(whole.shape, _dtype(whole), finite=True)
            found[f"index/{name}"] = Values(length, integer, low=0, high=whole.numel() - 1)
            found[f"values/{name}"] = Values(length, _dtype(whole), finite=True)
        return Record(optional=found)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        foreign = {key.partition("/")[2] for key in state} - set(self.selected)
        if foreign:
            raise ValueError(
                f"{self.name}: the checkpoint has a mask of `{min(foreign)}`, which this clause does not select"
            )
        self.seen = {name: int(state.get(f"seen/{name}", 0)) for name in self.selected}
        self.due = {name for name in self.selected if state.get(f"due/{name}")}
        sums = self._sums()
        sums.clear()
        for name, entries in self.selected.items():
            if f"sum/{name}" in state:
                sums[name] = state[f"sum/{name}"].to(entries.parameter.device, copy=True)
            entries.load(state)

    def summary(self) -> str | None:
        numel = sum(entries.parameter.numel() for entries in self.selected.values())
        chosen = [c for c in self.selected.values() if c.is_chosen]
        trained = sum(entries.values.numel() for entries in chosen)
        waiting = len(self.selected) - len(chosen)
        tail = f"; {waiting} had no gradient to choose by and did not train" if waiting else ""
        return f"{self.label}: {trained} of {numel} entries in {len(chosen)} tensors train{tail}"


class Turn(Action):
    """A phase in which another action, which has the state, acts as well."""

    def __init__(self, name: str, phase: Phase, act: Callable[[Step], None]) -> None:
        self.name, self.phase, self._act = name, phase, act
        self.gate = Gate()

    def run(self, step: Step) -> None:
        self._act(step)


def _dtype(parameter: Tensor) -> str:
    return str(torch.promote_types(parameter.dtype, torch.float32)).removeprefix("torch.")
