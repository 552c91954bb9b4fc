"""The field that a scheduled number comes from, and the check of the number in every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.errors import ValueOutOfRange
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import Scheduled
from trainc.dsl.reading.fields import field_type
from trainc.dsl.text.vocabulary import PLACES
from trainc.dsl.values.limits import Limits
from trainc.dsl.values.value_json import Expr, Items, expressions_in, to_json
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.expressions import names_read
from trainc.runtime.schedule.timeline import counters_at

POINTS = 40
"""Points of the run at which a schedule of the clock alone is looked at before the run."""


@dataclass(frozen=True, slots=True)
class ScheduleField:
    """A field of a clause whose value is an expression; without a name where the expression is in no field."""

    label: str
    title: str
    name: str
    expression: Expr
    limits: Limits | None

    @classmethod
    def of(cls, clause: BoundClause, expression: Expr) -> ScheduleField:
        """Return the field of a clause that holds this very expression."""
        for name, info in type(clause.construct).model_fields.items():
            held = expressions_in(getattr(clause.construct, name))
            parts = (part for one in held for part in (one, *_items(one)))
            if any(part is expression for part in parts):
                own = field_type(info)
                limits = None if own is None else own.limits
                return cls(clause.label, clause.title, name, expression, limits)
        return cls(clause.label, clause.title, "", expression, None)

    def checked(self, schedule: Scheduled, context: LoweringContext) -> Scheduled:
        """Return the schedule with a check of its numbers; raises ValueError for one that the clock alone will make."""
        if (limits := self.limits) is None:
            return schedule

        def at(clock: Clock) -> float:
            value = schedule(clock)
            if not limits.allow(value):
                raise ValueOutOfRange(
                    self._problem(value, f"in step {clock.steps}"), self.label, self.name
                )
            return value

        if not set(names_read(to_json(self.expression))) - set(PLACES):
            for percent, clock in _clocks(context):
                value = schedule(clock)
                if not limits.allow(value):
                    raise ValueError(self._problem(value, f"after {percent:g}% of the run"))
        return at

    def check_set(self, value: float, who: str, when: str) -> None:
        """Raise ValueOutOfRange for a number that the field cannot have; `who` sets it, and `when`."""
        if self.limits is not None and not self.limits.allow(value):
            raise ValueOutOfRange(
                f"{who} sets `{self.name}` of `{self.title}` to {value:g}{when}: expected {self.limits.words}",
                self.label,
                self.name,
            )

    def _problem(self, value: float, when: str) -> str:
        why = f"expected {self.limits.words}" if self.limits else ""
        if math.isnan(value):
            why = "a signal in it is not measured yet, or is not a number"
        elif math.isinf(value):
            why = "expected a finite number"
        return f"`{self.name} = {self.expression}` of `{self.title}` is {value:g} {when}: {why}"


def _items(expression: Expr) -> tuple[Expr, ...]:
    return expression.items if isinstance(expression, Items) else ()


def _clocks(context: LoweringContext) -> Iterator[tuple[float, Clock]]:
    """Yield clocks at fractions of the run, in percent; none where the run has no length."""
    if context.length is None:
        return
    units = replace(
        context.units, estimates={}
    )  # the plan says what it converts, not what this looks at
    for point in range(POINTS):
        fraction = point / POINTS
        clock = units.clock()
        for unit, value in counters_at(units, context.length, fraction).items():
            if unit != "epochs" and value is not None:
                setattr(clock, unit, value)
        yield 100 * fraction, clock
