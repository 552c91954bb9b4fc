"""The types of construct fields, and how each is read from a node, text, JSON or a value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from trainc.dsl.reading import constants, expressions, selectors
from trainc.dsl.reading.expressions import ANY_NAME, Names
from trainc.dsl.syntax.ast import Node, Str
from trainc.dsl.text.source import Source
from trainc.dsl.values import value_json as v
from trainc.dsl.values.functions import Function
from trainc.dsl.values.limits import FROM_ZERO, Limits

Reader = Callable[[Node, Names], Any]
Selected = Literal["modules", "parameters"]


class FieldType:
    """A type of the language as a pydantic annotation.

    `read` makes a value of a node and raises Unreadable, `coerce` checks any other value and raises
    ValueError. `functions` are those that the whole value may call beside the ones every expression has. `selects` is
    what its selectors match, None where it has none. `limits` hold its numbers in every step, None any finite ones. A
    `period` is how often something happens in a run. What is `scheduled` is one number in each step, which rules may
    set. One of `words` is a value as it stands, which needs no parser.
    """

    def __init__(
        self,
        title: str,
        read: Reader,
        coerce: Callable[[Any], Any],
        functions: Mapping[str, Function] | None = None,
        *,
        selects: Selected | None = None,
        limits: Limits | None = None,
        period: bool = False,
        scheduled: bool = False,
        words: Collection[str] = (),
    ) -> None:
        self.title = title
        self.read = read
        self.coerce = coerce
        self.functions = functions or {}
        self.selects = selects
        self.limits = limits
        self.period = period
        self.scheduled = scheduled
        self.words = words

    def accept(self, raw: Any) -> Any:
        """Return a value of this type from a value, its JSON form, or text in the language."""
        if isinstance(raw, str):
            raw = raw if raw in self.words else self._from_text(raw)
        elif isinstance(raw, list) and raw and isinstance(raw[0], str):
            raw = v.from_json(raw)
        elif isinstance(raw, list):
            raw = [v.from_json(item) if isinstance(item, list) else item for item in raw]
        return self.coerce(raw)

    def _from_text(self, text: str) -> Any:
        if self is IMPORT_PATH and '"' not in text:
            return constants.import_path(Str(text))
        try:
            return self.read(node_of(text), ANY_NAME)
        except constants.Unreadable as error:
            raise ValueError(f"`{text}`: {error.message or error.text}") from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.accept, serialization=core_schema.plain_serializer_function_ser_schema(v.to_json)
        )


def node_of(text: str) -> Node:
    """Return the tree of a text that is one expression, or raise ValueError."""
    # A spec that comes as JSON needs no parser.
    from trainc.dsl.syntax.parser import parse_expression

    node, found = parse_expression(Source("<text>", text))
    if node is None:
        detail = found[0].labels[0].text if found and found[0].labels else ""
        message = found[0].message if found else "empty"
        raise ValueError(f"`{text}`: {message}; {detail}".rstrip("; "))
    return node


def _duration(raw: Any) -> v.Duration:
    if isinstance(raw, v.Quantity):
        raw = raw.duration
    if isinstance(raw, v.Duration):
        if raw.amount < 0:
            raise ValueError("a duration cannot be negative")
        if raw.unit == "run" and raw.amount > 1:
            raise ValueError("a percentage is a part of the run: expected at most 100%")
        return raw
    if isinstance(raw, int | float):
        wanted = "expected a duration such as `200 steps`, found a number without a unit"
        raise PydanticCustomError("wrong_unit", wanted)
    raise ValueError("expected a duration such as `200 steps`")


def _samples_or_auto(raw: Any) -> v.Duration | str:
    return "auto" if raw == "auto" else _duration(raw)


def _range(raw: Any) -> v.Range:
    if isinstance(raw, tuple) and len(raw) == 2:
        return v.Range(*raw)
    if isinstance(raw, v.Range):
        return raw
    raise ValueError("expected a range such as `0.5..1.5`")


def _import_path(raw: Any) -> v.ImportPath:
    if isinstance(raw, v.ImportPath):
        return raw
    raise ValueError('expected "module:name"')


def _number(raw: Any) -> float:
    if isinstance(raw, v.Duration) and raw.unit == "run":
        return raw.amount
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError("expected a number")
    return v.plain_number(raw)


def _fraction(raw: Any) -> float:
    value = _number(raw)
    if not 0 <= value <= 1:
        raise ValueError("expected a fraction between 0 and 1, or a percentage")
    return float(value)


def _expression(raw: Any) -> v.Expr:
    if isinstance(raw, v.Duration):
        return v.Quantity(raw)
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return v.Number(raw)
    if isinstance(raw, v.Expr):
        return raw
    raise ValueError("expected a number or an expression")


def _schedule(raw: Any) -> v.Expr:
    value = _expression(raw)
    if isinstance(value, v.Quantity):
        return v.Number(_number(value.duration))
    return value


def _within(raw: Any, limits: Limits) -> v.Expr:
    value = _schedule(raw)
    if problem := expressions.outside(value, limits):
        raise ValueError(problem)
    return value


def _pair_within(raw: Any, limits: Limits) -> v.Expr:
    parts = raw.items if isinstance(raw, v.Items) else raw
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError("expected a list of two, such as `[0.9, 0.95]`")
    return v.Items(tuple(_within(part, limits) for part in parts))


def _scoped(
    raw: Any, one: Callable[[Any], v.Expr], *, pairs: bool
) -> v.Expr | tuple[v.Scoped, ...]:
    """Return an expression, or a list of entries, each a `Scoped` of what `one` returns."""
    if isinstance(raw, v.Scoped):
        raw = (raw,)
    listed = isinstance(raw, list | tuple)
    if not listed or (pairs and raw and not any(isinstance(x, v.Scoped) for x in raw)):
        return one(raw)
    given = (x if isinstance(x, v.Scoped) else v.Scoped(one(x)) for x in raw)
    return tuple(v.Scoped(one(x.value), x.on) for x in given)


def _selector(raw: Any) -> v.Selector:
    if isinstance(raw, v.Selector):
        return raw
    raise ValueError('expected a selector such as "blocks.*" or `type(Linear)`')


def _scoped_numbers(raw: Any) -> tuple[v.Scoped, ...]:
    items = raw if isinstance(raw, list | tuple) else (raw,)
    found = tuple(x if isinstance(x, v.Scoped) else v.Scoped(_number(x)) for x in items)
    for scoped in found:
        if not isinstance(scoped.value, int | float):
            raise ValueError("expected a number")
        if problem := expressions.outside(v.Number(scoped.value)):
            raise ValueError(problem)
    return found


def _plainly(read: Callable[[Node], Any]) -> Reader:
    """Return a reader for values that contain no names."""
    return lambda node, names: read(node)


DURATION = FieldType("duration", _plainly(constants.duration), _duration)
SAMPLES = FieldType("duration", _plainly(constants.samples), _duration)
SAMPLES_OR_AUTO = FieldType(
    "duration, or `auto`", _plainly(constants.samples_or_auto), _samples_or_auto
)
PERIOD = FieldType("duration", _plainly(constants.duration), _duration, period=True)
RANGE = FieldType("range", _plainly(constants.number_range), _range)
IMPORT_PATH = FieldType("import path", _plainly(constants.import_path), _import_path)
FRACTION = FieldType("fraction", _plainly(constants.number), _fraction)
EXPRESSION = FieldType("expression", expressions.expression, _expression)
CONDITION = FieldType("condition", expressions.condition, _expression)


def schedule_type(limits: Limits) -> FieldType:
    """Return the type of a schedule whose numbers are within limits."""
    read = partial(expressions.schedule_within, limits=limits)
    coerce = partial(_within, limits=limits)
    return FieldType("schedule", read, coerce, limits=limits, scheduled=True)


def scoped_schedule_type(limits: Limits, *, pairs: bool = False) -> FieldType:
    """Return the type of a schedule, or with `pairs` of a list of two, for all parameters or by selector."""
    within, read = (
        (_pair_within, expressions.pair_within) if pairs else (_within, expressions.schedule_within)
    )
    return FieldType(
        "pair of schedules, or pair `on` selector"
        if pairs
        else "schedule, or schedule `on` selector",
        partial(selectors.scoped_expressions, read=partial(read, limits=limits), pairs=pairs),
        partial(_scoped, one=partial(within, limits=limits), pairs=pairs),
        selects="parameters",
        limits=limits,
        scheduled=not pairs,
    )


SCHEDULE = schedule_type(FROM_ZERO)
SHRINKING_FACTOR = schedule_type(Limits(0, 1, open_low=True))
PROBABILITY = schedule_type(Limits(0, 1, open_high=True))
PROPORTION = schedule_type(Limits(0, 1))
SCOPED_SCHEDULES = scoped_schedule_type(FROM_ZERO)
SCOPED_DECAY_RATES = scoped_schedule_type(Limits(0, 1, open_high=True), pairs=True)
SIGNED_SCHEDULE = FieldType("schedule", expressions.schedule, _schedule, scheduled=True)
SELECTOR = FieldType("selector", _plainly(selectors.selector), _selector, selects="parameters")
MODULE_SELECTOR = FieldType("selector", _plainly(selectors.selector), _selector, selects="modules")
SCOPED_NUMBERS = FieldType(
    "number, or number `on` selector",
    _plainly(selectors.scoped_numbers),
    _scoped_numbers,
    selects="parameters",
    limits=FROM_ZERO,
)


def _nested(node: Node, names: Names) -> Any:
    found = constants.describe(node)
    wanted = "expected a construct with its fields in braces, such as `name { field = 1 }`"
    raise constants.Unreadable(node, f"{wanted}, found {found}")


def _no_value(raw: Any) -> Any:
    raise ValueError("expected no value: in Python this clause is one of its own")


NESTED_CLAUSE = FieldType("clause in braces", _nested, _no_value)


def samples_or_call(noun: str, functions: Mapping[str, Function], hint: str) -> FieldType:
    """Return the type of an amount of samples, or a call of one of `functions`.

    Messages call each of the functions a `noun`, and give `hint` for the call of any other.
    """

    def accept(raw: Any) -> v.Duration | v.Call:
        return _own_call(raw, noun, functions) if isinstance(raw, v.Call) else _duration(raw)

    read = partial(expressions.samples_or_call, noun=noun, functions=functions, hint=hint)
    return FieldType(f"samples, or a {noun}", read, accept, functions)


def call_of(noun: str, functions: Mapping[str, Function], example: str) -> FieldType:
    """Return the type of a call of one of `functions`; messages call each a `noun`, as in `example`."""
    read = partial(expressions.own_call, noun=noun, functions=functions, example=example)

    def accept(raw: Any) -> v.Call:
        if not isinstance(raw, v.Call):
            raise ValueError(f"expected a {noun} such as `{example}`")
        return _own_call(raw, noun, functions)

    return FieldType(f"a {noun}", read, accept, functions)


def _own_call(raw: v.Call, noun: str, functions: Mapping[str, Function]) -> v.Call:
    if raw.function not in functions:
        raise ValueError(f"there is no {noun} `{raw.function}`")
    return raw


def word_or_call(noun: str, words: Collection[str], functions: Mapping[str, Function]) -> FieldType:
    """Return the type of one of `words`, or a call of one of `functions`; messages call each a `noun`."""
    known = expressions.listed(words, functions)

    def accept(raw: Any) -> str | v.Call:
        if isinstance(raw, v.Call) and raw.function in functions:
            return raw
        if isinstance(raw, str) and raw in words:
            return raw
        raise ValueError(f"expected a {noun}: {known}")

    read = partial(expressions.word_or_call, noun=noun, words=words, functions=functions)
    return FieldType(f"one of {known}", read, accept, functions, words=words)


Duration = Annotated[v.Duration, DURATION]
Period = Annotated[v.Duration, PERIOD]
"""How often something happens: a period longer than the run is an error."""
Range = Annotated[v.Range, RANGE]
ImportPath = Annotated[v.ImportPath, IMPORT_PATH]
Fraction = Annotated[float, FRACTION]
Schedule = Annotated[v.Expr, SCHEDULE]
"""A number that is 0 or more in every step, or an expression for one."""
SignedSchedule = Annotated[v.Expr, SIGNED_SCHEDULE]
Samples = Annotated[v.Duration, SAMPLES]
SamplesOrAuto = Annotated[v.Duration | Literal["auto"], SAMPLES_OR_AUTO]
Selector = Annotated[v.Selector, SELECTOR]
"""A selection of parameters."""
ModuleSelector = Annotated[v.Selector, MODULE_SELECTOR]
NestedClause = Annotated[Any, NESTED_CLAUSE]
"""A clause of the same kind, which the field's construct never sees: its value is None."""
ScopedNumbers = Annotated[tuple[v.Scoped, ...], SCOPED_NUMBERS]
ScopedSchedules = Annotated[v.Expr | tuple[v.Scoped, ...], SCOPED_SCHEDULES]
"""A number that is 0 or more in every step, or an expression for one; for all parameters, or by selector."""
ScopedDecayRates = Annotated[v.Expr | tuple[v.Scoped, ...], SCOPED_DECAY_RATES]
"""A list of two numbers in [0, 1) such as Adam's betas, or expressions for them; also by selector."""
ShrinkingFactor = Annotated[v.Expr, SHRINKING_FACTOR]
"""A number above 0 and at most 1 in every step, or an expression for one."""
Density = ShrinkingFactor
"""A fraction of entries above 0, at most 1, in every step, or an expression for one."""
Probability = Annotated[v.Expr, PROBABILITY]
"""A number that is 0 or more and below 1 in every step, or an expression for one."""
Proportion = Annotated[v.Expr, PROPORTION]
"""A number that is 0 or more and at most 1 in every step, or an expression for one."""
