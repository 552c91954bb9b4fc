"""Measured numbers as short text: a number, an interval, and a row of bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def format_number(value: float) -> str:
    """Return a number in at most three digits, `?` for NaN."""
    if math.isnan(value):
        return "?"
    return f"{value:.0f}" if 1000 <= abs(value) < 10_000 else f"{value:.3g}".replace("e+0", "e")


def format_loss(value: float) -> str:
    """Return a loss with four decimals; with four digits and an exponent from a million on, or below 0.001."""
    usual = value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value)
    return f"{value:.4f}" if usual else f"{value:.4g}"


def format_interval(value: float, low: float, high: float) -> str:
    """Return a positive number with its interval; `[?]` if the interval has no bound above zero and below infinity."""
    known = low > 0 or high < math.inf
    return f"{format_number(value)} [{f'{format_number(low)}, {format_number(high)}' if known else '?'}]"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return values as a row of at most `width` bars, each a mean; `!` where no value is finite."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    means: list[float] = []
    for at in range(0, len(values), size):
        finite = [value for value in values[at : at + size] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    span = high - low or 1.0
    return "".join(
        BARS[round((mean - low) / span * (len(BARS) - 1))] if math.isfinite(mean) else "!"
        for mean in means
    )
