"""Parameters as an optimizer sees them: the options that schedules set, and the factors that policies set on these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Parameter

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate

Scheduled = Callable[[Clock], float]


@dataclass(slots=True)
class LrFactor:
    """A factor on an option of one or more parameters, by default the learning rate, set by one policy.

    `unit` names the parameters. The factor is `factor`, or what `schedule` gives in each step; while `gate` is closed
    it is 1. `of` is `lr`, `weight_decay`, or `half_life`: the time in which the last of `betas` forgets half.
    """

    policy: str
    unit: str
    factor: float = 1.0
    gate: Gate | None = None
    schedule: Scheduled | None = None
    of: str = "lr"
    of_batch: Callable[[int], float] | None = None
    """What the factor is at a batch of so many samples, where it follows the batch alone; its policy sets it."""
    limits: tuple[float, float] | None = None
    """Between which numbers it stays, where its policy knows; only the plan reads them."""

    def at(self, clock: Clock) -> float:
        """Return the factor in the step at this clock."""
        if self.gate is not None and not self.gate.fires(clock):
            return 1.0
        return self.factor if self.schedule is None else self.schedule(clock)


@dataclass(slots=True, eq=False)
class Option:
    """A number of an optimizer over the run, for the parameters that it is of: a rate, a decay, one of two betas.

    `constant` is the number where it is the same in every step, and `text` what the spec says. `part` tells apart the
    parameters that have another one: a selector, a place in the model.
    """

    at: Scheduled
    text: str = ""
    constant: float | None = None
    part: str = ""

    @classmethod
    def fixed(cls, number: float) -> Option:
        """Return the option that is one number."""
        return cls(lambda clock: number, f"{number:.12g}", number)

    @property
    def key(self) -> object:
        """Return what options that are always equal share."""
        return id(self) if self.constant is None else self.constant

    def begin(self, otherwise: float) -> float:
        """Return the number that the optimizer is built with; `otherwise` where a signal says it in the steps."""
        try:
            number = self.at(Clock())
        except ValueError:
            return otherwise
        return number if math.isfinite(number) else otherwise


OptionValue = Option | tuple[Option, ...]
OptionValues = dict[str, OptionValue]
"""The options of a parameter by torch's names: `lr`, `weight_decay`, `betas`."""


OPTION_FACTORS = {"weight_decay": "weight_decay", "betas": "half_life"}
"""What factors on an option are of."""


def parts_of(value: OptionValue) -> tuple[Option, ...]:
    """Return the numbers of an option: one, or those of a tuple."""
    return value if isinstance(value, tuple) else (value,)


@dataclass(slots=True)
class ParamSlot:
    """A parameter as the optimizer sees it: all or selected entries, its weight decay, options and factors.

    `weight_decay` is the one that the optimizer is built with. Without `options` nothing is set in steps.
    """

    name: str
    tensor: Parameter
    weight_decay: float
    lr_factors: tuple[LrFactor, ...] = ()
    options: OptionValues = field(default_factory=dict)
    factors: Mapping[str, tuple[LrFactor, ...]] = field(default_factory=dict)
    """Factors on other options than the rate, by what they are of."""
    any_length: bool = False
    """Whether `tensor` has selected entries, and their number is known when they are chosen."""

    def factor(self, clock: Clock) -> float:
        """Return the product of the factors on the rate in the step at this clock."""
        return _product(self.lr_factors, clock)

    def rate(self, clock: Clock) -> float:
        """Return the learning rate without factors."""
        rate = self.options["lr"]
        assert isinstance(rate, Option)
        return rate.at(clock)

    def moving(self, clock: Clock) -> Iterator[tuple[str, float | tuple[float, ...]]]:
        """Yield those of the other options that may differ from step to step, and what each is in this one."""
        for name, value in self.options.items():
            of = OPTION_FACTORS.get(name, "")
            factors, parts = self.factors.get(of, ()), parts_of(value)
            if name == "lr" or (not factors and all(x.constant is not None for x in parts)):
                continue
            numbers = [part.at(clock) for part in parts]
            if of == "half_life" and factors:
                numbers[-1] **= 1 / _product(factors, clock)
            elif factors:
                numbers = [number * _product(factors, clock) for number in numbers]
            yield name, tuple(numbers) if isinstance(value, tuple) else numbers[0]

    def built(self) -> dict[str, Any]:
        """Return the options that the optimizer's group is built with, and the rate where it is one number."""
        found: dict[str, Any] = {"weight_decay": self.weight_decay}
        for name, value in self.options.items():
            if name == "lr" and isinstance(value, Option) and value.constant is not None:
                found[name] = value.constant
            if isinstance(value, tuple):
                found[name] = tuple(part.begin(0.0) for part in value)
        return found

    @property
    def key(self) -> object:
        """Return what the slots of one group share."""
        options = ((n, tuple(x.key for x in parts_of(v))) for n, v in self.options.items())
        factors = (id(f) for found in self.factors.values() for f in found)
        return self.weight_decay, tuple(map(id, self.lr_factors)), tuple(options), tuple(factors)


Group = tuple[int, dict[str, Any], list[ParamSlot]]
"""Number and options of a group of a torch optimizer, and its parameters."""


def _product(factors: Sequence[LrFactor], clock: Clock) -> float:
    return math.prod((one.at(clock) for one in factors), start=1.0) if factors else 1.0


def group_slots(slots: Iterable[ParamSlot]) -> list[list[ParamSlot]]:
    """Group slots by options and factors, in order of first appearance: torch's parameter groups."""
    groups: dict[object, list[ParamSlot]] = {}
    for slot in slots:
        groups.setdefault(slot.key, []).append(slot)
    return list(groups.values())


def first_refused(
    make: Callable[[list[dict[str, Any]]], object], slots: Sequence[ParamSlot]
) -> str | None:
    """Return the first parameter for which alone `make` builds no optimizer; None where that holds for all."""
    refused = []
    for slot in slots:
        try:
            make([{"params": [slot.tensor], **slot.built()}])
        except Exception:  # as a class may raise anything
            refused.append(slot.name)
    return refused[0] if 0 < len(refused) < len(slots) else None
