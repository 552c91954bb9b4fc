"""Compile the expressions of `when` rules, which may call functions of what a number was before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.dsl.values.functions import REMEMBERING
from trainc.dsl.values.value_json import expr_from_json
from trainc.runtime.rules.history import Best, History, Window
from trainc.runtime.schedule.expressions import Compiled
from trainc.runtime.schedule.schedules import Schedules
from trainc.runtime.schedule.time_span import TimeSpan


@dataclass
class RuleExpressions(Schedules):
    """Schedules, and calls of `best`, `since_best` and `mean`, for which `history` remembers numbers."""

    context: LoweringContext = field(kw_only=True)
    history: History = field(kw_only=True)

    def call(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], start: float
    ) -> Compiled:
        """Compile a call."""
        if name not in REMEMBERING:
            return super().call(name, args, options, start)
        read = self._number(args[0], start)
        memories, number = self.history.memories, expr_from_json(args[0])
        if name == "mean":
            span = self._window(args[1])
            made = Window(f"mean({number}, {expr_from_json(args[1])})", read.at, span)
            window = memories.setdefault(made.text, made)
            assert isinstance(window, Window)
            return Compiled(lambda clock, values: window.mean(clock), unit=read.unit)
        lowest = Best(f"best({number})", read.at)
        best = memories.setdefault(lowest.text, lowest)
        assert isinstance(best, Best)
        if name == "best":
            return Compiled(lambda clock, values: best.lowest, unit=read.unit)
        return Compiled(lambda clock, values: clock.steps - best.step, unit="steps")

    def _window(self, duration: Any) -> TimeSpan:
        """Return the window of a mean as the clock counts it."""
        span = TimeSpan(float(duration[1]), duration[2])
        if not span.amount > 0:
            raise ValueError("the window of a mean must be longer than 0")
        return self.context.counted(span)


def rule_expressions(context: LoweringContext, history: History) -> RuleExpressions:
    """Return what compiles the rules of one spec."""
    known = context.units, context.schedule_length, context.signal_units
    return RuleExpressions(*known, context=context, history=history)
