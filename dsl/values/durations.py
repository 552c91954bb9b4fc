"""Plain values: durations, ranges, import paths; and what every value of the language shares."""

from __future__ import annotations

import math
from typing import Literal, get_args

from trainc.dsl.text.record import Record

Unit = Literal["steps", "samples", "tokens", "epochs", "seconds", "run"]
UNITS: tuple[Unit, ...] = get_args(Unit)


def tidy(value: float) -> float:
    """Return a finite number, as an int where it is whole, so that 2 and 2.0 are one value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, found {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError("the number is too large")
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)


class Value(Record):
    """What all values share: `str` gives their text in the language."""

    def __str__(self) -> str:
        from trainc.dsl.printing.canonical import format_value

        return format_value(self)


class Duration(Value):
    """A stretch of training; unit `run` is a fraction of the whole run, written `5%`."""

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"`{self.unit}` is not a unit; units are {', '.join(UNITS)}")
        self._put("amount", tidy(self.amount))


class Range(Value):
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        self._put("low", tidy(self.low))
        self._put("high", tidy(self.high))
        if self.low > self.high:
            raise ValueError(f"the range ends at {self.high}, before it begins at {self.low}")


class ImportPath(Value):
    """A Python object by name, written `"module:attribute"`; naming it imports nothing."""

    module: str
    attribute: str

    def __post_init__(self) -> None:
        for part in (self.module, self.attribute):
            if not all(name.isidentifier() for name in part.split(".")):
                raise ValueError(f"`{part}` is not a dotted Python name")
