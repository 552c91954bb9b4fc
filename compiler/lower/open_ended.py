"""Time without a run: what schedules mean in a spec that is embedded and has no `run` clause."""

from __future__ import annotations

from typing import Any

from trainc.runtime.schedule.clock import RunLength

UNBOUNDED = RunLength(2.0**52, "steps")
"""A length that no training reaches; it stands in where a spec has no run."""

_TO_THE_END = {"cosine", "linear", "exponential", "wsd"}


def ends_with_the_run(expression: Any) -> bool:
    """Say whether an expression's JSON measures anything against the length of the run."""
    match expression:
        case ["dur", _, "run"]:
            return True
        case ["call", name, args, options]:
            if name in _TO_THE_END and "over" not in options:
                return True
            return any(map(ends_with_the_run, [*args, *options.values()]))
        case [str(), *parts]:
            return any(ends_with_the_run(part) for part in parts)
        case list():
            return any(map(ends_with_the_run, expression))
    return False
