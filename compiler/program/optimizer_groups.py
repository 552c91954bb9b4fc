"""The parameter groups of a program as torch's schedulers and loggers see them: views that are read, not written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.soundness.gradient_norm import Slot
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep, Rates


class LiveGroup(MutableMapping[str, Any], dict[str, Any]):  # type: ignore[metaclass,misc]
    """A view of one group of a torch optimizer: `lr` is the rate in force, before the first step that of this step.

    What others keep in a group, as schedulers do, is kept beside it. Raises ValueError where one of the optimizer's own
    options is set to another value.
    """

    def __init__(
        self, optimizer: OptimizerStep, number: int, rates: Rates | None, clock: Clock
    ) -> None:
        self._optimizer, self._number = optimizer, number
        self._rates, self._clock = rates, clock
        self._kept: dict[str, Any] = {}

    @property
    def _options(self) -> dict[str, Any]:
        return self._optimizer.torch.param_groups[self._number]

    def __getitem__(self, key: str) -> Any:
        if key in self._kept:
            return self._kept[key]
        if key == "lr" and self._rates is not None and not self._clock.steps:
            slots = next(slots for i, _, slots in self._optimizer.in_groups() if i == self._number)
            return slots[0].rate(self._clock) * slots[0].factor(self._clock)
        return self._options[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self._options:
            self._kept[key] = value
            return
        if key == "params":
            raise self._refused(key, "another selection", "on")
        if key == "lr" and float(value) == self._kept.get("initial_lr"):
            return  # a scheduler that leaves the rate as it found it
        if not _same(value, self[key]):
            raise self._refused(key, repr(value), key)

    def _refused(self, key: str, value: str, field: str) -> ValueError:
        name, who = self._optimizer.name, _scheduler()
        now = self[key] if key != "params" else "that of its clause"
        by = f" by `{who}`" if who else ""
        instead = (
            "write the schedule there, such as `lr = 1e-3 * cosine()`, and use no other scheduler"
            if key == "lr"
            else "write it there"
        )
        return ValueError(
            f"`{key}` of `{name}` was set to {value}{by}, but the spec says what it is, now {now}, in its field"
            f" `{field}`: {instead}"
        )

    def __delitem__(self, key: str) -> None:
        del self._kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._options, **self._kept})

    def __len__(self) -> int:
        return len({**self._options, **self._kept})

    def __repr__(self) -> str:
        return repr({key: self[key] for key in self})


def live_groups(machine: StepMachine) -> list[LiveGroup]:
    """Return a view of each group of each optimizer of a program."""
    rates = {a.optimizer.name: a for a in machine.actions if isinstance(a, Rates)}
    return [
        LiveGroup(one, number, rates.get(one.name), machine.clock)
        for one in _optimizers(machine)
        for number, _, _ in one.in_groups()
    ]


def optimizer_slots(machine: StepMachine) -> list[Slot]:
    """Return the trained parameters of all optimizers of a program."""
    return [slot for one in _optimizers(machine) for slot in one.slots]


def optimized(machine: StepMachine) -> Iterator[torch.nn.Parameter]:
    """Yield what the optimizers of a program update: parameters, or the trained entries of those that are masked."""
    for one in _optimizers(machine):
        for group in one.torch.param_groups:
            yield from group["params"]


def _optimizers(machine: StepMachine) -> list[OptimizerStep]:
    return [action for action in machine.actions if isinstance(action, OptimizerStep)]


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other)


def _scheduler() -> str | None:
    """Return the class of the scheduler of torch that is writing now."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.optim.lr_scheduler.LRScheduler):
            return type(owner).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return None
