"""Short ways to write expressions and to evaluate them, for a run of 200 steps."""

from __future__ import annotations

import math
from typing import Any

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.schedules import compile_condition, compile_schedule
from trainc.runtime.schedule.unit_conversion import UnitConversion

BATCH, TOKENS, EPOCH = 32, 128, 6400
UNITS = UnitConversion(BATCH, TOKENS, EPOCH)
LENGTH = RunLength(200, "steps")
NAN = math.nan


def number(value: float) -> list[Any]:
    return ["num", value]


def percent(value: float) -> list[Any]:
    return ["dur", value / 100, "run"]


def steps(value: float) -> list[Any]:
    return ["dur", value, "steps"]


def call(name: str, *args: Any, **options: Any) -> list[Any]:
    return ["call", name, list(args), {key.rstrip("_"): value for key, value in options.items()}]


def name(text: str) -> list[Any]:
    return ["name", text]


def at(step: int, batch: int = BATCH) -> Clock:
    return Clock(step, step * batch, step * batch * TOKENS, samples_per_epoch=EPOCH)


def values(expression: Any, length: RunLength = LENGTH, **env: float) -> list[float]:
    schedule = compile_schedule(expression, UNITS, length)
    return [schedule(at(step), env) for step in range(200)]


def holds(expression: Any, clock: Clock | None = None, **env: float) -> bool:
    found = compile_condition(expression, UNITS, LENGTH)(clock or at(0), env)
    assert isinstance(found, bool)
    return found
