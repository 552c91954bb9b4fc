"""The scheduled fields of clauses: what they are now, and the numbers that rules gave them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Signals, Step
from trainc.runtime.storage.form import Form, Number, Record

Scheduled = Callable[[Clock], float]
Check = Callable[[float, str, str], None]
"""Raises an error for a number that a field cannot have; told the number, what sets it, and when."""


@dataclass(eq=False)
class Fields(Action):
    """Phase 1: keeps the numbers that rules gave to fields, each in place of the field's schedule from then on.

    `settable` are the fields that rules set, as `label.field`; any other is its schedule and costs nothing.
    """

    settable: Collection[str] = ()
    values: dict[str, float] = field(default_factory=dict, init=False)
    phase = Phase.BATCH
    name = "fields set by rules"
    outlasts_rollback = True

    def __post_init__(self) -> None:
        self.schedules: dict[str, Scheduled] = {}
        """Every scheduled field of the spec's clauses that is one number for the whole model."""
        self.placed: set[str] = set()
        """Those that have a number for each layer."""
        self.read_by_rules: set[str] = set()
        self._checks: dict[str, Check] = {}

    def add(self, name: str, schedule: Scheduled, check: Check, *, placed: bool) -> Scheduled:
        """Take in the schedule of a field, and return what the field is: what a rule set last, or else the schedule."""
        if placed:
            self.placed.add(name)
        self.schedules[name], self._checks[name] = schedule, check
        if name not in self.settable:
            return schedule
        values = self.values

        def now(clock: Clock) -> float:
            held = values.get(name)
            return schedule(clock) if held is None else held

        return now

    def read(self, name: str, clock: Clock) -> float:
        """Return the number of a field at a clock; NaN where a signal in its schedule is not measured yet."""
        if (held := self.values.get(name)) is not None:
            return held
        try:
            return self.schedules[name](clock)
        except ValueError:
            return math.nan

    def check(self, name: str, value: float) -> None:
        """Raise ValueError for a number that no rule can set a field to."""
        if not math.isfinite(value):
            raise ValueError(f"it sets `{name}` to {value}: write a finite number")
        self._checks[name](value, "it", "")

    def values_at(self, step: Step) -> Signals:
        """Return what expressions of rules read at the beginning of a step: signals, the batch, and fields."""
        read = {name: self.read(name, step.clock) for name in self.read_by_rules}
        return Signals({**step.signals, "batch": float(step.batch_size), **read})

    def set(self, name: str, value: float, step: Step, rule: str) -> bool:
        """Set a field from this step on, say so in the step's notes, and return whether that changes it."""
        before = None if name in self.placed else self.read(name, step.clock)
        if self.values.get(name) == value:
            return False
        self._checks[name](value, f"the rule `{rule}`", f" in step {step.clock.steps}")
        self.values[name] = value
        was = "" if before is None else f"{before:.6g} -> "
        step.notes.append(f"{name} {was}{value:.6g}: {rule}")
        return True

    def run(self, step: Step) -> None:
        """Do nothing: rules set what this holds."""

    def state_dict(self) -> ActionState:
        return dict(self.values)

    def state_form(self) -> Form:
        return Record(optional=dict.fromkeys(self.settable, Number()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values.clear()
        self.values.update({name: float(value) for name, value in state.items()})

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        kept = {name: value for name, value in state.items() if name in self.settable}
        self.load_state_dict(kept)
        lost = sorted(set(state) - set(kept))
        return (
            f"{', '.join(lost)}: the schedule holds again, because no rule sets it"
            if lost
            else None
        )

    def summary(self) -> str | None:
        if not self.values:
            return None
        shown = ", ".join(f"{name} = {value:.6g}" for name, value in sorted(self.values.items()))
        return f"set by rules at the end: {shown}"
