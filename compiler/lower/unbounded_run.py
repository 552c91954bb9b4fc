"""Schedules in a spec that has no `run` clause, and so no length."""

from __future__ import annotations

from typing import Any

from trainc.runtime.schedule.clock import RunLength

UNBOUNDED = RunLength(2.0**52, "steps")
"""A length that no training reaches; it stands in where a spec has no run."""

_UNTIL_THE_END = {"cosine", "linear", "exponential", "wsd"}
"""The functions that last until the end of the run where they have no `over`."""


def depends_on_run_length(expression: Any) -> bool:
    """Say whether the value of an expression, given as JSON, depends on the length of the run."""
    match expression:
        case ["dur", _, "run"]:
            return True
        case ["call", name, args, options]:
            if name in _UNTIL_THE_END and "over" not in options:
                return True
            return any(map(depends_on_run_length, [*args, *options.values()]))
        case [str(), *parts]:
            return any(depends_on_run_length(part) for part in parts)
        case list():
            return any(map(depends_on_run_length, expression))
    return False
