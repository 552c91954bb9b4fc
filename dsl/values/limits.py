"""The numbers that a field allows in every step."""

from __future__ import annotations

import math

from trainc.dsl.text.record import Record


class Limits(Record):
    """The numbers from `low` to `high`; an end that is open is not one of them, and infinity never is."""

    low: float = 0.0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def allow(self, number: float) -> bool:
        """Say whether a number is one of them; NaN is none."""
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below and number < math.inf

    @property
    def words(self) -> str:
        """Return what they are: `0 or more`, `a number above 0, at most 1`."""
        low = f"a number above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        if self.high == math.inf:
            return low
        return f"{low}, {'below' if self.open_high else 'at most'} {self.high:g}"


FROM_ZERO = Limits()
