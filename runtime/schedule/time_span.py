"""Time spans on the clock of a run, in steps, samples, tokens, epochs, seconds or as a fraction of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, cast, get_args

Unit = Literal["steps", "samples", "tokens", "epochs", "seconds", "run"]
UNITS: tuple[Unit, ...] = get_args(Unit)


def snap(value: float) -> float:
    """Return the integer that `value` is equal to except for rounding, or else `value`."""
    nearest = round(value) if math.isfinite(value) else value
    return float(nearest) if abs(value - nearest) <= 1e-9 * max(1.0, abs(value)) else float(value)


class Duration(Protocol):
    """The amount and the unit of a time span, as a duration of a spec has them."""

    @property
    def amount(self) -> float:
        """Return the amount, in `unit`."""

    @property
    def unit(self) -> Unit:
        """Return the unit."""


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """An amount of one unit; `run` is a fraction of the run. Raises ValueError for a negative or infinite amount."""

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"`{self.unit}` is not a unit of time: use one of {', '.join(UNITS)}")
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise ValueError(
                f"{self.amount:g} {self.unit}: expected a finite number of {self.unit}, 0 or more"
            )

    @classmethod
    def of(cls, duration: Duration) -> Self:
        """Return the time span of a duration."""
        return cls(duration.amount, duration.unit)

    def __str__(self) -> str:
        if self.unit == "run":
            return f"{self.amount * 100:g}%"
        return f"{self.amount:.12g} {self.unit}"

    def to_json(self) -> dict[str, Any]:
        """Return `{"amount": .., "unit": ..}`."""
        return {"amount": self.amount, "unit": self.unit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(float(data["amount"]), cast("Unit", data["unit"]))
