"""The form of a clock's state."""

from __future__ import annotations

from typing import Any

from trainc.runtime.storage.form import (
    Anything,
    Count,
    Form,
    Number,
    Optional,
    Record,
    StateProblem,
)

_COUNTERS: dict[str, Form] = {name: Count() for name in ("steps", "samples", "tokens")}
_COUNTERS["seconds"] = Number(0)
_BEFORE = Optional(Record({**_COUNTERS, "before": Anything()}))
_CLOCK = Record({**_COUNTERS, "before": _BEFORE})


def check_clock(clock: Any, path: str) -> None:
    """Raise StateProblem unless this is a clock's state, whose step before is one step behind."""
    _CLOCK.check(clock, path)
    before = clock["before"]
    if before is None:
        return
    if before["steps"] != clock["steps"] - 1:
        expected = f"{clock['steps'] - 1}, one less than `{path}/steps`"
        raise StateProblem(f"{path}/before/steps", expected, str(before["steps"]))
    if before["before"] is not None:
        raise StateProblem(f"{path}/before/before", "None", "there")
    for name in ("samples", "tokens", "seconds"):
        if before[name] > clock[name]:
            expected = f"at most {clock[name]}, as `{path}/{name}`"
            raise StateProblem(f"{path}/before/{name}", expected, str(before[name]))
