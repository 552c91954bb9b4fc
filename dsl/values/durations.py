"""Plain values: durations, ranges and import paths."""

from __future__ import annotations

from typing import Literal, get_args

from trainc.dsl.values.notation import ATOM, Written, infix, number, quoted
from trainc.dsl.values.value import Value, plain_number

Unit = Literal["steps", "samples", "tokens", "epochs", "seconds", "run"]
UNITS: tuple[Unit, ...] = get_args(Unit)


class Duration(Value):
    """An amount of training; the unit `run` is a fraction of the whole run, written `5%`."""

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"`{self.unit}` is not a unit: write one of {', '.join(UNITS)}")
        self._set("amount", plain_number(self.amount))

    def written(self) -> Written:
        if self.unit == "run":
            return f"{_percent(self.amount)}%", ATOM
        unit = self.unit[:-1] if self.amount == 1 else self.unit
        return f"{abs(self.amount)!r} {unit}", ATOM


class Range(Value):
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        self._set("low", plain_number(self.low))
        self._set("high", plain_number(self.high))
        if self.low > self.high:
            raise ValueError(
                f"the first number of a range, {self.low}, cannot be above the second, {self.high}"
            )

    def written(self) -> Written:
        return infix("..", number(self.low), number(self.high))


class ImportPath(Value):
    """A Python object by name, written `"module:attribute"`; naming it imports nothing."""

    module: str
    attribute: str

    def __post_init__(self) -> None:
        for part in (self.module, self.attribute):
            if not all(name.isidentifier() for name in part.split(".")):
                raise ValueError(f"`{part}` is not a dotted Python name such as `package.module`")

    def written(self) -> Written:
        return quoted(f"{self.module}:{self.attribute}")


def _percent(amount: float) -> str:
    """Return a hundred times a number, exactly as its digits say."""
    from decimal import Decimal

    exact = (Decimal(repr(abs(amount))) * 100).normalize()
    short = format(exact, "f")
    return short if len(short) <= 20 else str(exact).lower()
