"""The actions of `mask sift`: choose the entries, and write the trained entries into the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.update_mask import SelectedEntries, largest

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.constructs.mask.sift import Granularity, Sift
    from trainc.runtime.step.record import Step


@dataclass(frozen=True, slots=True)
class Choices:
    """What can be chosen in a tensor of `shape`: `count` elements, rows or columns of `size` entries each."""

    granularity: Granularity
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape) // self.size

    @property
    def size(self) -> int:
        axis = {"row": 0, "column": 1}.get(self.granularity)
        return 1 if axis is None else math.prod(self.shape) // self.shape[axis]

    def score(self, gradient: Tensor) -> Tensor:
        """Return the magnitude of each choice's gradient, shape (count,)."""
        if self.granularity == "element":
            return gradient.flatten().abs()
        across = gradient if self.granularity == "row" else gradient.transpose(0, 1)
        return across.flatten(1).square().sum(1).sqrt()

    def entries(self, chosen: Tensor) -> Tensor:
        """Return the sorted flat positions of the entries of some choices."""
        import torch

        if self.granularity == "element":
            return chosen
        positions = torch.arange(math.prod(self.shape), device=chosen.device).view(self.shape)
        axis = int(self.granularity == "column")
        return positions.index_select(axis, chosen).flatten().sort().values


class Choose(Action):
    """Phase 8, before clipping: sum gradients until the entries are chosen, then gather those entries only."""

    phase = Phase.GRADIENTS

    def __init__(
        self, label: str, selected: Sequence[SelectedEntries], rule: Sift, start: Gate | None
    ) -> None:
        self.label, self.name = label, f"{label} choice"
        self.selected = {entries.name: entries for entries in selected}
        self.rule = rule
        self.start = start
        # The weights wait for `from` as well, so the action itself always runs.
        self.gate = Gate()
        self.sums: dict[str, Tensor] = {}
        self.seen = dict.fromkeys(self.selected, 0)

    def run(self, step: Step) -> None:
        import torch

        for entries in self.selected.values():
            entries.read()
        waiting = [c for c in self.selected.values() if c.index is None]
        found = {c.name: g for c in waiting if (g := c.parameter.grad) is not None}
        for entries in waiting:
            entries.discard()
        if not found or (self.start is not None and not self.start.fires(step.clock)):
            return
        dense = {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}
        if not torch.stack([g.isfinite().all() for g in dense.values()]).all():
            step.notes.append(f"{self.name}: a gradient is not finite, so this step is not counted")
            return
        self._add(dense)
        groups = [waiting] if self.rule.scope == "global" else [[c] for c in waiting]
        for group in groups:
            if all(self.seen[entries.name] >= self.rule.batches for entries in group):
                self._choose(group)

    def _add(self, found: Mapping[str, Tensor]) -> None:
        import torch

        for name, gradient in found.items():
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide
        for name in self.selected if self.rule.scope == "global" else found:
            self.seen[name] += 1

    def _choose(self, group: Sequence[SelectedEntries]) -> None:
        import torch

        choices = [Choices(self.rule.granularity, tuple(c.parameter.shape)) for c in group]
        sums = [self.sums.pop(c.name, None) for c in group]
        scores = [
            torch.zeros(some.count, device=c.parameter.device) if s is None else some.score(s)
            for c, some, s in zip(group, choices, sums, strict=True)
        ]
        count = self.rule.count(sum(len(score) for score in scores))
        for entries, some, chosen in zip(group, choices, largest(scores, count), strict=True):
            entries.choose(some.entries(chosen))

    def memory(self) -> int:
        """Return the bytes held beside the weights."""
        sums = sum(tensor.numel() * tensor.element_size() for tensor in self.sums.values())
        return sums + sum(entries.memory() for entries in self.selected.values())

    def state_dict(self) -> ActionState:
        state: ActionState = {f"sum/{name}": tensor for name, tensor in self.sums.items()}
        state |= {f"seen/{name}": seen for name, seen in self.seen.items() if seen}
        for name, entries in self.selected.items():
            if entries.index is not None:
                state |= {f"index/{name}": entries.index, f"values/{name}": entries.values.detach()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import torch

        foreign = {key.partition("/")[2] for key in state} - set(self.selected)
        if foreign:
            raise ValueError(
                f"{self.name}: the checkpoint masks `{min(foreign)}`, which this clause does not select"
            )
        self.seen = {name: int(state.get(f"seen/{name}", 0)) for name in self.selected}
        self.sums = {}
        for name, entries in self.selected.items():
            device = entries.parameter.device
            if f"sum/{name}" in state:
                self.sums[name] = state[f"sum/{name}"].to(device, copy=True)
            if f"index/{name}" not in state:
                entries.forget()
                continue
            entries.choose(state[f"index/{name}"])
            with torch.no_grad():
                entries.values.copy_(state[f"values/{name}"])

    def summary(self) -> str | None:
        numel = sum(entries.parameter.numel() for entries in self.selected.values())
        chosen = [c for c in self.selected.values() if c.index is not None]
        trained = sum(entries.values.numel() for entries in chosen)
        waiting = len(self.selected) - len(chosen)
        tail = f"; {waiting} had no gradient to choose by and did not train" if waiting else ""
        return f"{self.label}: {trained} of {numel} entries in {len(chosen)} tensors train{tail}"


class WriteBack(Action):
    """Phase 10: put the updated entries into the weights."""

    phase = Phase.DELTAS

    def __init__(self, label: str, selected: Sequence[SelectedEntries]) -> None:
        self.name = f"{label} write"
        self.metric = f"{label}.moved"
        self.selected = tuple(selected)
        self.gate = Gate()

    def run(self, step: Step) -> None:
        import torch

        chosen = [entries for entries in self.selected if entries.index is not None]
        changed = [entries.write() for entries in chosen]
        total = sum(entries.values.numel() for entries in chosen)
        # Entries of 16-bit weights may stay where they are although their master copy moves.
        step.metrics[self.metric] = float(torch.stack(changed).sum()) / total if total else 0.0
