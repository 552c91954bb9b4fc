"""The choice of the entries that train, in a run: once or every so often, by weights or by gradients of some steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.mask.entry_choice import Choice
from trainc.runtime.mask.mask_actions import record_overlap
from trainc.runtime.mask.positions import Arrived, Positions
from trainc.runtime.mask.scores import Score, ScoredChoice, SummedScores, not_finite
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
            due = name in self.due
            at_once = due and self._chooses_alone(entries)
            arrival = partial(self._find, self.score, step, name) if at_once else None
            entries.open_step(keeps_dense=due, arrival=arrival)

    def _chooses_alone(self, entries: SelectedEntries) -> bool:
        """Say whether the gradient of this step completes a choice that depends on no other tensor.

        That of a vector of which nothing is chosen is kept: the norms of vectors are measured together.
        """
        is_last = self.seen[entries.name] + 1 >= self.batches
        is_measured = entries.is_chosen or entries.parameter.dim() != 1
        return is_last and is_measured and not self._joint

    def _find(self, score: SummedScores, step: Step, name: str, dense: Tensor) -> Arrived:
        """Return what is to be chosen by the step's whole gradient, which can be freed then; `_end` chooses it."""
        if not dense.isfinite().all():
            return Arrived(finite=False, positions=None)
        scores = score.with_last(name, score.of(step, name, dense))
        if not scores.isfinite().all():
            return Arrived(finite=True, positions=None)
        (mask,) = self.choice.masks({name: scores}, self.density).values()
        return Arrived(finite=True, positions=Positions.of(_index(mask), mask.numel()))

    def run(self, step: Step) -> None:
        """Follow weights that were set from outside, and free gradients, but for what choices that are due need."""
        for entries in self.selected.values():
            entries.read()
            entries.close_passes()
        waiting = [entries for entries in self.selected.values() if entries.kept is not None]
        if not _are_finite([entries.kept for entries in waiting]):
            step.notes.append(f"{self.name}: a gradient is not finite, so this step is not counted")
            for entries in waiting:
                entries.kept = None
            return
        for entries in waiting:
            if isinstance(self.score, SummedScores) and isinstance(entries.kept, Tensor):
                find = entries.arrival or partial(self.score.of, step, entries.name)
                entries.kept = find(entries.kept)

    def _end(self, step: Step) -> None:
        """Add what the step says of the choices that are due, and choose what has seen enough steps."""
        score = self.score
        assert isinstance(score, SummedScores)
        for group in self._groups():
            names = [entries.name for entries in group]
            if isinstance(arrived := group[0].kept, Arrived):
                self._take(step, score, group[0], arrived)
                continue
            added = [self._add(score, entries) for entries in group]
            if any(added):
                self.seen.update({name: self.seen[name] + 1 for name in names})
            if all(self.seen[name] >= self.batches for name in names):
                self._choose(step, ScoredChoice(self.label, names, score.take, self.choice))
                self.seen.update(dict.fromkeys(names, 0))

    def _take(
        self, step: Step, score: SummedScores, entries: SelectedEntries, arrived: Arrived
    ) -> None:
        """Choose what was found as the gradient arrived."""
        entries.kept = None
        score.sums.pop(entries.name, None)
        self.seen[entries.name] = 0
        if arrived.positions is None:
            step.notes.append(not_finite(self.label, entries.name))
        else:
            self._switch(step, {entries.name: arrived.positions.index()})

    def _add(self, score: SummedScores, entries: SelectedEntries) -> bool:
        """Add what the step says of a tensor to its score, and return whether it had a gradient."""
        found, entries.kept = entries.kept, None
        if not isinstance(found, Tensor):
            return False
        score.add_found(entries.name, found)
        return True

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
        if masks is not None:
            self._switch(step, {name: _index(mask) for name, mask in masks.items()})

    def _switch(self, step: Step, chosen: Mapping[str, Tensor]) -> None:
        """Train the entries at these sorted flat positions (k,) from now on, by parameter."""
        for name, index in chosen.items():
            entries = self.selected[name]
            before = entries.values.numel()
            stayed = entries.choose(index, *step.optimizer_entries(name))
            if stayed is not None:
                self._overlap[name] = stayed, len(index)
                entries.left |= stayed < before
            step.series.setdefault(f"{self.label}.density", {})[name] = entries.density
            entries.keeps_dense = False
        self.due.difference_update(chosen)
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
            if entries.left:  # `trainc delta` finds it by this key
                state[f"left/{name}"] = True
        return state

    def state_form(self) -> Form:
        found: dict[str, Form] = {}
        for name, entries in self.selected.items():
            whole = entries.parameter
            # How many there are is a matter of scores or of weights where shapes alone do not say it.
            length = entries.values.shape if self.choice.known else [None]
            integer = "int32" if whole.numel() <= torch.iinfo(torch.int32).max else "int64"
            found[f"seen/{name}"] = Count(1)
            found[f"due/{name}"] = found[f"left/{name}"] = Flag()
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
            entries.left = bool(state.get(f"left/{name}"))

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


def _index(mask: Tensor) -> Tensor:
    """Return the sorted flat positions of what a mask chooses, (k,)."""
    return mask.flatten().nonzero()[:, 0]


def _are_finite(kept: Sequence[Tensor | Arrived | None]) -> bool:
    """Say whether all gradients are finite; those that are held are read in one transfer."""
    if not all(one.finite for one in kept if isinstance(one, Arrived)):
        return False
    held = [one.isfinite().all() for one in kept if isinstance(one, Tensor)]
    return not held or bool(torch.stack(held).all())


def _dtype(parameter: Tensor) -> str:
    return str(torch.promote_types(parameter.dtype, torch.float32)).removeprefix("torch.")
