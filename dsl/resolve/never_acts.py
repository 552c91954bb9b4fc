"""Lines of a spec that cannot act in this run: times beyond its end, and conditions that no value meets.

`trainc check` knows the length of the run, the compiler also how many samples a step and an epoch have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from trainc.dsl.reading.fields import field_type
from trainc.dsl.resolve.statements import Clause, Do, Rule
from trainc.dsl.text.diagnostic import Diagnostic, Label, Severity
from trainc.dsl.text.record import Record
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import COUNTERS
from trainc.dsl.values import value_json as v
from trainc.dsl.values.value_ranges import ANYTHING, Bounds, Convert, bounds, can_be_true


class RunTime(Record):
    """How long the run is, how its units are converted, and the batch where it is fixed.

    A length that `--set` gives makes a trial: what only its end keeps from acting is no error, but a warning.
    """

    length: v.Duration | None
    more: Convert | None = None
    batch: Bounds = Bounds(1, math.inf, "samples")
    micro_batch: Bounds = Bounds(1, math.inf, "samples")
    trial: bool = False

    @classmethod
    def of(cls, clauses: Iterable[Clause]) -> RunTime:
        """Return what the clauses themselves say."""
        run = next((c for c in clauses if c.kind == "run"), None)
        length = getattr(run.construct, "length", None) if run else None
        if run is None or not isinstance(length, v.Duration):
            return cls(None)
        return cls(length, trial=run.provenance("length").how == "set")

    def convert(self, amount: float, unit: str, wanted: str) -> float | None:
        """Return a number of one unit in another, None where that is not known."""
        if unit == wanted:
            return amount
        if self.length is None:
            return None
        if unit == "run":
            return self.convert(amount * self.length.amount, self.length.unit, wanted)
        if wanted == "run":
            found = self.convert(amount, unit, self.length.unit)
            return None if found is None else found / self.length.amount
        return None if self.more is None else self.more(amount, unit, wanted)

    def part(self, duration: v.Duration | None) -> float | None:
        """Return which part of the run a duration is, None where that is not known."""
        if duration is None:
            return None
        found = self.convert(duration.amount, duration.unit, "run")
        return None if found is None else round(found, 12)

    def bounds_of(self, name: str) -> Bounds:
        """Return the bounds of a name in a rule, which looks before a step, and so never at the end."""
        if name == "progress":
            return Bounds(0, 1)
        if name in ("batch", "micro_batch"):
            return self.batch if name == "batch" else self.micro_batch
        if name in ("lr", "gradient_norm"):
            return Bounds(0, math.inf)
        if name in (*COUNTERS, "step") and self.length is not None:
            unit = "steps" if name == "step" else name
            end = self.convert(self.length.amount, self.length.unit, unit)
            if end is not None and self.length.unit == unit == "steps":
                end = max(0, math.ceil(end) - 1)
            return Bounds(0, math.inf if end is None else end, unit)
        return ANYTHING


def never_acting(
    clauses: Sequence[Clause], rules: Sequence[Rule], run: RunTime
) -> Iterator[Diagnostic]:
    """Yield a diagnostic for every line that cannot act: a warning where the end of the run acts in its place."""
    acts = [a for rule in rules for a in rule.actions if isinstance(a, Do)]
    opened = {action.argument for action in acts if action.verb == "open"}
    for clause in clauses:
        if clause.name not in opened:
            yield from _times(clause, run)
        yield from _fields(clause, run)
    for rule in rules:
        yield from _rule(rule, run)


def _times(clause: Clause, run: RunTime) -> Iterator[Diagnostic]:
    start, stop, every = (run.part(d) for d in (clause.start, clause.stop, clause.every))
    title = clause.construct.title
    if start is not None and start >= 1:
        message = f"`{title}` never acts: the run ends before `from {clause.start}`"
        yield _never(
            message, clause.part_span("from"), run, "write an earlier `from`, or remove the clause"
        )
        return
    first = clause.start or v.Duration(0, clause.stop.unit if clause.stop else "steps")
    ordered = _not_before(clause.start, clause.stop, run)
    if ordered:
        message = f"`{title}` never acts: `from {first}` is not before `until {clause.stop}`"
        help = "move one of the two, or remove the clause"
        yield _never(message, clause.part_span("until"), run, help, always=True)
        return
    if every is not None and (start is not None or clause.start is None):
        rest = min(1.0, 1.0 if stop is None else stop) - (start or 0.0)
        if every > rest:
            yield _once(clause, run)


def _once(clause: Clause, run: RunTime) -> Diagnostic:
    """Return the error, a warning where the construct's own interval is too long for the run: nobody asked for it."""
    title, longer = clause.construct.title, "is longer than what is left of the run"
    span = clause.part_span("every")
    if clause.paced_by_default:
        message = f"`{title}` acts only once: `every {clause.every}`, which it has without one of its own, {longer}"
        return _never(message, span, run, "write a shorter `every`", "warning")
    message = f"`{title}` acts only once: `every {clause.every}` {longer}"
    return _never(message, span, run, "write a shorter `every`, or remove the clause")


def _not_before(start: v.Duration | None, stop: v.Duration | None, run: RunTime) -> bool:
    """Say whether a start is surely not before an end."""
    if stop is None:
        return False
    if stop.amount == 0:
        return True
    if start is None:
        return False
    begins = run.convert(start.amount, start.unit, stop.unit)
    return begins is not None and begins >= stop.amount


def _fields(clause: Clause, run: RunTime) -> Iterator[Diagnostic]:
    """Yield what is wrong with periods in fields, and with `from` and `every` of the calls that a field alone takes."""
    start = run.part(clause.start) or 0.0
    for name, info in type(clause.construct).model_fields.items():
        value, own = getattr(clause.construct, name), field_type(info)
        span = clause.part_span(name)
        for expression in v.expressions_in(value):
            yield from _warmups(clause, name, expression, run, span)
        if own is None:
            continue
        if own.period and isinstance(value, v.Duration):
            yield from _period(clause, name, value, start, run, span)
        if isinstance(value, v.Call) and value.function in own.functions:
            for word, argument in value.kwargs:
                if not isinstance(argument, v.Quantity) or word not in ("from", "every"):
                    continue
                part = run.part(argument.duration)
                if part is not None and (part >= 1 if word == "from" else part > 1):
                    message = (
                        f"`{value.function}` never acts: the run ends before `{word} = {argument}`"
                    )
                    yield _never(message, span, run, f"write a shorter `{word}`")


def _warmups(
    clause: Clause, name: str, value: v.Expr, run: RunTime, span: Span | None
) -> Iterator[Diagnostic]:
    """Yield a warning for a warm-up that the run ends before, so that the full number is never reached."""
    for call in v.walk(value):
        if not (isinstance(call, v.Call) and call.function == "warmup"):
            continue
        over = dict(call.kwargs).get("over", call.args[0] if call.args else None)
        part = run.part(over.duration) if isinstance(over, v.Quantity) else None
        if part is not None and part > 1:
            message = (
                f"`{name}` of `{clause.construct.title}` never reaches its full value: the run ends before"
                f" `{call}` does"
            )
            yield _never(message, span, run, "write a shorter `over`", "warning")


def _period(
    clause: Clause, name: str, value: v.Duration, start: float, run: RunTime, span: Span | None
) -> Iterator[Diagnostic]:
    part = run.part(value)
    if part is None or part <= 1 - start:
        return
    # The end of a run is evaluated and saved whatever these periods are.
    severity: Severity = "warning" if clause.kind == "run" else "error"
    message = (
        f"`{name} = {value}` of `{clause.construct.title}` is longer than what is left of the run"
    )
    help = f"write a shorter period, or remove `{name}`"
    if severity == "warning":
        message += ", so it acts at the end only"
    yield _never(message, span, run, help, severity)


def _rule(rule: Rule, run: RunTime) -> Iterator[Diagnostic]:
    hold = run.part(rule.hold)
    span = rule.part_span("condition")
    if (window := next(_long_windows(rule, run), None)) is not None:
        yield window
    elif not can_be_true(rule.condition, run.bounds_of, run.convert):
        message = f"this rule never acts: `{rule.condition}` is never true in this run"
        timed = any(isinstance(x, v.Name) and x.id in COUNTERS for x in v.walk(rule.condition))
        help = _for_condition(rule.condition, run)
        yield _never(message, span, run, help, always=not timed)
    elif hold is not None and hold >= 1:
        message = f"this rule never acts: `for {rule.hold}` is as long as the run, or longer"
        yield _never(message, rule.part_span("for"), run, "write a shorter `for`")
    else:
        yield from _equal_by_chance(rule, run, span)


def _long_windows(rule: Rule, run: RunTime) -> Iterator[Diagnostic]:
    """Yield a diagnostic for every mean over a window that the run is not longer than."""
    for part, value in rule.expressions():
        for call in v.walk(value):
            if not (isinstance(call, v.Call) and call.function == "mean"):
                continue
            over = call.args[1]
            length = run.part(over.duration) if isinstance(over, v.Quantity) else None
            if length is not None and length >= 1:
                message = f"`{call}` is never known: the run ends before {over} of it have passed"
                yield _never(message, rule.part_span(part), run, "write a shorter window")


def _for_condition(condition: v.Expr, run: RunTime) -> str:
    used = {x.id for x in v.walk(condition) if isinstance(x, v.Name)}
    if "progress" in used:
        return "`progress` goes from 0 to 1: write `progress > 50%`, or count `steps` or `epochs`"
    fixed = [n for n in ("batch", "micro_batch") if n in used and run.bounds_of(n).constant]
    if fixed:
        return f"`{fixed[0]}` is {run.bounds_of(fixed[0]).low:g} samples in the whole run"
    return "change the number, or remove the rule"


def _equal_by_chance(rule: Rule, run: RunTime, span: Span | None) -> Iterator[Diagnostic]:
    """Yield a warning for `==` between a measured number and a constant, which are hardly ever equal."""
    counted = {"progress", "batch", "micro_batch", "step", *COUNTERS}
    for item in v.walk(rule.condition):
        if not (isinstance(item, v.Binary) and item.op == "=="):
            continue
        sides = (item.left, item.right)
        names = {x.id for side in sides for x in v.walk(side) if isinstance(x, v.Name)}
        if names - counted and any(bounds(side).constant for side in sides):
            name = min(names - counted)
            message = f"`{item}` is hardly ever true: a measured number such as `{name}` is equal to another by chance"
            help = f"compare with `<` or `>`, or with a range: `abs({item.left} - {item.right}) < 0.01`"
            yield _never(message, span, run, help, "warning")


def _never(
    message: str,
    span: Span | None,
    run: RunTime,
    help: str,
    severity: Severity = "error",
    *,
    always: bool = False,
) -> Diagnostic:
    """Return the diagnostic; `always` where another length of the run would change nothing."""
    if run.trial and not always:
        severity = "warning"
    labels = (Label(span, f"the run has {run.length}"),) if span and run.length else ()
    if span and not labels:
        labels = (Label(span),)
    return Diagnostic("never-acts", message, labels, (), help, severity)
