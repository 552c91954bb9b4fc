"""Parameters as an optimizer sees them, and the factors that policies set on their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate


@dataclass(slots=True)
class LrFactor:
    """A factor on the learning rate of one or more parameters, set by one policy; `unit` names these parameters.

    While `gate` is closed the parameters keep their rate.
    """

    policy: str
    unit: str
    factor: float = 1.0
    gate: Gate | None = None

    def at(self, clock: Clock) -> float:
        """Return the factor in the step at this clock."""
        return self.factor if self.gate is None or self.gate.fires(clock) else 1.0


@dataclass(slots=True)
class ParamSlot:
    """A parameter as the optimizer sees it: all or selected entries, its weight decay and rate factors."""

    name: str
    tensor: Parameter
    weight_decay: float
    lr_factors: tuple[LrFactor, ...] = ()

    def factor(self, clock: Clock) -> float:
        """Return the product of the factors in the step at this clock."""
        if not self.lr_factors:
            return 1.0
        return math.prod((one.at(clock) for one in self.lr_factors), start=1.0)


def group_slots(slots: Iterable[ParamSlot]) -> list[list[ParamSlot]]:
    """Group slots by weight decay and rate factors, in order of first appearance: torch's parameter groups."""
    groups: dict[tuple[float, tuple[int, ...]], list[ParamSlot]] = {}
    for slot in slots:
        key = (slot.weight_decay, tuple(id(lr_factor) for lr_factor in slot.lr_factors))
        groups.setdefault(key, []).append(slot)
    return list(groups.values())


def first_refused(
    make: Callable[[list[dict[str, Any]]], object], slots: Sequence[ParamSlot]
) -> str | None:
    """Return the first parameter for which alone `make` builds no optimizer; None where that holds for all."""
    refused = []
    for slot in slots:
        try:
            make([{"params": [slot.tensor], "weight_decay": slot.weight_decay}])
        except Exception:  # as a class may raise anything
            refused.append(slot.name)
    return refused[0] if 0 < len(refused) < len(slots) else None
