"""The base of the language's values, and the text of values and plain Python values."""

from __future__ import annotations

import math
from typing import Any

from trainc.dsl.text.record import Record
from trainc.dsl.values.notation import ATOM, Written, bracketed, listed, number, quoted


class Value(Record):
    """A value of the language; `str` gives its text."""

    def written(self) -> Written:
        """Return its text, and how tightly its outermost operator binds."""
        raise NotImplementedError

    def __str__(self) -> str:
        return bracketed(self.written())


def value_text(value: Any) -> str:
    """Return the text of a value, a number, a string, a boolean or a list of such."""
    return bracketed(_written(value))


def _written(value: Any) -> Written:
    match value:
        case Value():
            return value.written()
        case None:
            return "none", ATOM
        case bool():
            return "true" if value else "false", ATOM
        case int() | float():
            return number(value)
        case str():
            return quoted(value)
        case list() | tuple():
            return listed(map(_written, value))
    raise TypeError(f"{value!r} is not a value of the language")


def plain_number(value: float) -> float:
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
