"""A signal of a clause, as the live display and tables show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainc.runtime.report.number_text import format_interval, format_number, sparkline


@dataclass(frozen=True, slots=True)
class ShownSignal:
    """A signal by its name in records, with the title that it is shown under and what it counts.

    `ends` are the names of its interval's ends. `own_text` is the text that its construct gives a step's value, which
    may be None. `main`: the clause has its name.
    """

    name: str
    title: str
    unit: str | None = None
    ends: tuple[str, str] | None = None
    logarithmic: bool = False
    main: bool = True
    own_text: Callable[[Mapping[str, Any]], str | None] | None = None

    def text(self, record: Mapping[str, Any]) -> str | None:
        """Return a step's value with its interval, such as `142 [98, 210]`; None where the step has none."""
        if self.name not in record:
            return None
        try:
            text = None if self.own_text is None else self.own_text(record)
        except Exception as error:  # no reason to end a run, or a report
            text = f"{type(error).__name__}: {error}"
        if text is not None:
            return text
        value = float(record[self.name])
        if self.ends is None or math.isnan(value):
            return format_number(value)
        low, high = (float(record.get(end, math.nan)) for end in self.ends)
        return format_interval(value, low, high)

    def text_with_unit(self, record: Mapping[str, Any]) -> str | None:
        """Return a step's value with its unit, where the value is known."""
        text = self.text(record)
        known = text is not None and math.isfinite(record[self.name])
        return f"{text} {self.unit}" if known and self.unit else text

    def history(self, records: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
        """Return in how many steps it was undetermined, and its values over the run as bars; `!` is undetermined.

        Where it is logarithmic so are the bars: on a linear scale all but the largest values would look the same.
        """
        values = [float(record[self.name]) for record in records if self.name in record]
        shown = [_log(value) for value in values] if self.logarithmic else values
        return sum(not math.isfinite(value) for value in values), sparkline(shown)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan
