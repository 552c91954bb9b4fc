"""The actions of a step that make gradients, optimizer state and weights obey update masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.mask.zero_mask import ZeroMask
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Count, Flag, Form, Plain, Record, Values

Chooser = Callable[[Step, float], Mapping[str, Tensor] | None]
"""Given the step and the fraction to keep, where entries train: bool by parameter; None to choose in a later step."""


def record_overlap(step: Step, label: str, found: Mapping[str, tuple[int, int]]) -> None:
    """Record which fraction of the entries chosen in this step trained before: of each tensor, and as a signal of all.

    `found` has by parameter how many of its entries stay, and how many are chosen.
    """
    if not found:
        return
    name = f"{label}.overlap"
    step.series[name] = {n: stayed / max(1, count) for n, (stayed, count) in found.items()}
    stayed, count = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    step.metrics[name] = step.signals[name] = stayed / max(1, count)


class WriteBack(Action):
    """Phase 10: put the updated entries into the weights."""

    phase = Phase.DELTAS

    def __init__(self, label: str, selected: Iterable[SelectedEntries]) -> None:
        self.name = f"{label} write"
        self.metric = f"{label}.moved"
        self.selected = tuple(selected)
        # Entries that were chosen go on training when the clause's time is over.
        self.gate = Gate()

    def run(self, step: Step) -> None:
        chosen = [entries for entries in self.selected if entries.is_chosen]
        changed = [entries.write() for entries in chosen]
        total = sum(entries.values.numel() for entries in chosen)
        # Entries of 16-bit weights may stay where they are although their master copy moves.
        step.metrics[self.metric] = float(torch.stack(changed).sum()) / total if total else 0.0


class ChooseZeros(Action):
    """Phase 3, before the forward pass: choose which entries train when the clause's time has come; zero the others.

    They are chosen when `window` fires first, and, where it has an `every`, each time; in between, and when the window
    is over, the mask stays. A parameter that was frozen since then keeps its entries, and its choice is due when it
    trains again; those that never train, which are `frozen` or were when this was made, are masked as they are.
    `setting` is the text of what the choice depends on: a run that resumes with another one chooses again.
    """

    phase = Phase.PERTURB

    def __init__(
        self,
        label: str,
        masks: Mapping[str, ZeroMask],
        choose: Chooser,
        density: Callable[[Clock], float],
        window: Gate,
        setting: str,
        frozen: Collection[str] = (),
    ) -> None:
        self.label, self.name, self.metric = label, f"{label} choice", f"{label}.density"
        self.masks = masks
        self.choose, self.density = choose, density
        self.window, self.span = window, window.span()
        self.setting = setting
        self._frozen = frozen
        self._never = {n for n, mask in masks.items() if not mask.parameter.requires_grad}
        self._noted = False
        self.chosen = False
        self.due: set[str] = set()
        """The parameters whose entries are to be chosen as soon as they can be."""
        self.fresh: set[str] = set()
        """The parameters whose entries were chosen in this step."""
        self.gate = Gate()  # `window` is read below, because a mask stays when it is over

    @property
    def entries(self) -> int:
        """The entries of all tensors."""
        return sum(mask.parameter.numel() for mask in self.masks.values())

    @property
    def kept(self) -> int:
        """The entries that train."""
        return sum(mask.count for mask in self.masks.values())

    def run(self, step: Step) -> None:
        self._check_parameters(step)
        self.fresh = set()
        if self.window.fires(step.clock):
            self.due |= set(self.masks if self.window.every is not None or not self.chosen else ())
        if self.due and self.span.fires(step.clock):
            self._choose(step, [name for name in self.masks if name in self.due])
        step.metrics[self.metric] = self.kept / self.entries if self.entries else 1.0

    def _check_parameters(self, step: Step) -> None:
        for name, mask in self.masks.items():
            if step.parameters[name] is not mask.parameter:
                raise ValueError(
                    f"{self.label}: `{name}` was replaced after `trainc.compile`, as FSDP2 does, and a mask of zeros"
                    " needs the whole tensor it was made for: train with DistributedDataParallel, or remove the mask"
                )

    def _choose(self, step: Step, due: Sequence[str]) -> None:
        trained = [name for name in due if not self._waits(name)]
        if not trained:
            return
        density = self.density(step.clock)
        if not 0 < density <= 1:
            raise ValueError(
                f"{self.label}: the density is {density:g} at step {step.clock.steps}: expected a fraction above 0%, at"
                " most 100%"
            )
        found = self.choose(step, density)
        if found is None:
            return
        overlap = {}
        for name in trained:
            before = self.masks[name].kept_entries() if self.chosen else None
            self.masks[name].choose(found[name], *step.optimizer_entries(name))
            if before is not None:
                overlap[name] = int((before & found[name]).sum()), self.masks[name].count
        record_overlap(step, self.label, overlap)
        self.fresh = set(trained)
        self.chosen = True
        self.due.difference_update(trained)
        self._note_frozen(step)
        step.series[self.metric] = {name: mask.density for name, mask in self.masks.items()}

    def _waits(self, name: str) -> bool:
        """Return whether a parameter that trains in other steps is frozen."""
        trains = self.masks[name].parameter.requires_grad or name in self._never
        return not trains and name not in self._frozen

    def _note_frozen(self, step: Step) -> None:
        """Say once which parameters keep their entries because they are frozen."""
        frozen = [name for name in self.masks if name in self.due]
        if frozen and not self._noted:
            self._noted = True
            more = f" (and {len(frozen) - 1} more)" if len(frozen) > 1 else ""
            step.notes.append(
                f"{self.label}: `{frozen[0]}`{more} is frozen, so its entries stay as they are until it trains again"
            )

    def memory(self) -> int:
        """Return the bytes of the masks."""
        return sum(mask.memory() for mask in self.masks.values())

    def state_dict(self) -> ActionState:
        if not (self.chosen or self.due):
            return {}
        state: ActionState = {"chosen": self.chosen, "setting": self.setting}
        state |= {f"due/{name}": True for name in self.masks if name in self.due}
        for name, mask in self.masks.items():
            state[f"count/{name}"] = mask.count
            if mask.kept is not None:
                state[f"kept/{name}"] = mask.kept
        return state

    def state_form(self) -> Form:
        entries: dict[str, Form] = {"chosen": Flag(), "setting": Plain()}
        packed: dict[str, Form] = {}
        for name, mask in self.masks.items():
            entries[f"count/{name}"] = Count(0, mask.parameter.numel())
            packed[f"due/{name}"] = Flag()
            packed[f"kept/{name}"] = Values([(mask.parameter.numel() + 7) // 8], "uint8")
        return Record(entries, packed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        foreign = {key.partition("/")[2] for key in state} - {"", *self.masks}
        if foreign:
            raise ValueError(
                f"{self.name}: the checkpoint has a mask of `{min(foreign)}`, which this clause does not select"
            )
        self.chosen = bool(state.get("chosen"))
        self.due = {name for name in self.masks if state.get(f"due/{name}")}
        for name, mask in self.masks.items():
            count = state.get(f"count/{name}", mask.parameter.numel())
            mask.restore(state.get(f"kept/{name}"), int(count))

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        self.load_state_dict(state)
        new = any(f"count/{name}" not in state for name in self.masks)
        if not self.chosen or (state["setting"] == self.setting and not new):
            return None
        self.due = set(self.masks)
        return f"{self.label}: chooses entries again in the next step, because its fields or its selection changed"

    def summary(self) -> str | None:
        if not self.chosen:
            return f"{self.label}: no entries were chosen, so none is zero"
        zero, tensors = self.entries - self.kept, len(self.masks)
        frozen = [name for name in self.masks if name in self.due and self._waits(name)]
        left_out = f"; `{frozen[0]}` was frozen at the last choice" if frozen else ""
        return f"{self.label}: {zero} of {self.entries} entries in {tensors} tensors are zero{left_out}"


class ZeroGradients(Action):
    """Phase 8, before clipping: zero the gradients of entries that are zero."""

    phase = Phase.GRADIENTS

    def __init__(self, label: str, masks: Iterable[ZeroMask]) -> None:
        self.name = f"{label} gradients"
        self.masks = tuple(masks)
        self.gate = Gate()

    def run(self, step: Step) -> None:
        for mask in self.masks:
            mask.zero_gradient()


class ZeroWeights(Action):
    """Phase 10: zero the entries that are zero again, whatever the optimizer made of them."""

    phase = Phase.DELTAS

    def __init__(self, label: str, masks: Iterable[ZeroMask]) -> None:
        self.name = f"{label} weights"
        self.masks = tuple(masks)
        self.gate = Gate()

    def run(self, step: Step) -> None:
        for mask in self.masks:
            mask.write()
