"""Nodes of the tree to expressions: schedules, conditions, and what rules assign."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from trainc.dsl.reading.constants import (
    Unreadable,
    constant,
    describe,
    duration,
    number,
    number_of,
    samples,
)
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.vocabulary import BOOLEANS, COUNTERS, PLACES, SHAPES, STATES
from trainc.dsl.values import value_json as v
from trainc.dsl.values.functions import FUNCTIONS, REMEMBERING, ArgumentKind, CallOf, Function
from trainc.dsl.values.limits import FROM_ZERO, Limits
from trainc.dsl.values.value_ranges import ANYTHING, Bounds, bounds

_LOGIC = ("and", "or")


class Names:
    """Checks the names in an expression; this base class accepts all, since a whole spec is checked later."""

    functions: Mapping[str, Function] = FUNCTIONS | REMEMBERING
    """The functions that it may call."""

    def check(self, name: ast.Ident) -> None:
        """Report a name that is not defined."""

    def help_for_function(self, function: str) -> str | None:
        """Return where a function that only one field allows can be called; None for any other function."""
        return None


ANY_NAME = Names()


def expression(node: Node, names: Names = ANY_NAME) -> v.Expr:
    """Return an expression whose value is a number."""
    value = _expression(node, names)
    if is_condition(value):
        raise Unreadable(node, "expected a number, found a condition")
    return value


def condition(node: Node, names: Names = ANY_NAME) -> v.Expr:
    """Return a condition."""
    value = _expression(node, names)
    if not is_condition(value):
        raise Unreadable(node, "expected a condition such as `loss > 2`, found a number")
    return value


def schedule(node: Node, names: Names = ANY_NAME) -> v.Expr:
    """Return a schedule; a percentage alone is a constant number."""
    value = expression(node, names)
    if isinstance(value, v.Quantity) and value.duration.unit != "run":
        raise Unreadable(
            node,
            f"expected a number or a schedule, found an amount of {value.duration.unit}",
            "wrong-unit",
        )
    return v.Number(value.duration.amount) if isinstance(value, v.Quantity) else value


def schedule_within(node: Node, names: Names = ANY_NAME, limits: Limits = FROM_ZERO) -> v.Expr:
    """Return a schedule whose values are within limits, as far as that is known before the run."""
    value = schedule(node, names)
    if problem := outside(value, limits):
        raise Unreadable(node, problem)
    return value


def pair_within(node: Node, names: Names = ANY_NAME, limits: Limits = FROM_ZERO) -> v.Expr:
    """Return two schedules in a list, each within limits."""
    if not isinstance(node, ast.Items) or len(node.items) != 2:
        found = f"a list of {len(node.items)}" if isinstance(node, ast.Items) else describe(node)
        raise Unreadable(node, f"expected a list of two, such as `[0.9, 0.95]`, found {found}")
    return v.Items(tuple(schedule_within(item, names, limits) for item in node.items))


def outside(value: v.Expr, limits: Limits = FROM_ZERO) -> str | None:
    """Return what is wrong with a schedule that leaves its limits whatever happens; None for any other."""
    known = bounds(value, _from_zero)
    if known.constant and math.isinf(known.low):
        return "expected a finite number"
    if known.constant:
        found = f", found {known.low:g}"
        return None if limits.allow(known.low) else f"expected {limits.words}{found}"
    if known.low < limits.low and known.high <= limits.low:
        return f"expected {limits.words}: this is never above {limits.low:g}"
    if known.high > limits.high and known.low >= limits.high:
        return f"expected {limits.words}: this is never below {limits.high:g}"
    return None


def _from_zero(name: str) -> Bounds:
    """Return what is known of a name before the run: places, counters and sizes are 0 or more."""
    if name in ("progress", "depth"):
        return Bounds(0, 1)
    if name in (*PLACES, *COUNTERS, "batch", "micro_batch", "step"):
        return Bounds(0, math.inf)
    return ANYTHING


def samples_or_call(
    node: Node, names: Names, noun: str, functions: Mapping[str, Function], hint: str
) -> v.Duration | v.Expr:
    """Return an amount of samples, or the call of one of a field's own `functions`; each is called a `noun`.

    `hint` is the help for the call of any other function.
    """
    if not isinstance(node, ast.Apply):
        return samples(node)
    name = node.function.id
    if name not in functions and name in FUNCTIONS:
        raise Unreadable(node, f"expected an amount such as `32 samples`, or a {noun}", help=hint)
    return own_call(node, names, noun, functions, "")


def own_call(
    node: Node, names: Names, noun: str, functions: Mapping[str, Function], example: str
) -> v.Expr:
    """Return the call of one of a field's own `functions`; each is called a `noun`, as in `example`."""
    if not isinstance(node, ast.Apply):
        raise Unreadable(node, f"expected a {noun} such as `{example}`, found {describe(node)}")
    name = node.function.id
    if name in functions:
        return _call(node, names, functions)
    message = f"there is no {noun} `{name}`"
    raise Unreadable(node.function, "", "unknown-function", suggest(name, functions), message)


def word_or_call(
    node: Node, names: Names, noun: str, words: Collection[str], functions: Mapping[str, Function]
) -> str | v.Expr:
    """Return one of `words`, or the call of one of a field's own `functions`; each is called a `noun`."""
    if isinstance(node, ast.Apply) and node.function.id in functions:
        return _call(node, names, functions)
    if isinstance(node, ast.Ident) and node.id in words:
        return node.id
    given = node.function.id if isinstance(node, ast.Apply) else getattr(node, "id", None)
    help = None if given is None else suggest(given, (*words, *functions))
    text = f"expected a {noun}: {listed(words, functions)}"
    raise Unreadable(node, text, help=help)


def listed(words: Iterable[str], functions: Mapping[str, Function]) -> str:
    """Return words and calls as a message lists them: "`a`, `b` or `f(n = ...)`"."""
    calls = (
        f"{name}({', '.join(f'{argument} = ...' for argument in function.arguments)})"
        for name, function in functions.items()
    )
    *most, last = [f"`{one}`" for one in (*words, *calls)]
    return f"{', '.join(most)} or {last}" if most else last


def is_condition(value: v.Expr) -> bool:
    """Say whether an expression is a condition, not a number."""
    if isinstance(value, v.Unary):
        return value.op == "not"
    return isinstance(value, v.Binary) and value.op in (*v.COMPARISONS, *_LOGIC)


def _expression(node: Node, names: Names) -> v.Expr:
    match node:
        case ast.Num():
            return v.Number(number_of(node))
        case ast.Measure():
            value = constant(node)
            assert isinstance(value, v.Duration)
            return v.Quantity(value)
        case ast.Ident():
            names.check(node)
            return v.Name(node.id)
        case ast.Apply():
            return _call(node, names)
        case ast.Prefix("not", operand):
            return v.Unary("not", condition(operand, names))
        case ast.Prefix(_, operand):
            return v.Unary("neg", expression(operand, names))
        case ast.Infix("and" | "or" as op, left, right):
            return v.Binary(op, condition(left, names), condition(right, names))
        case ast.Infix("is", left, ast.Ident(state)):
            if state not in STATES:
                text = f"expected {', '.join(f'`{s}`' for s in STATES[:-1])} or `{STATES[-1]}`"
                raise Unreadable(node.right, text, help=suggest(state, STATES))
            return v.Binary("is", expression(left, names), v.Name(state))
        case ast.Infix("then", ast.Infix("*", _, _), ast.Apply()):
            help = "put the schedule in brackets, `3e-4 * (warmup(5%) then cosine())`, or give each piece a factor"
            raise Unreadable(
                node,
                "this factor applies to the first piece only, because `*` binds tighter than `then`",
                help=help,
            )
        case ast.Infix(op, left, right) if op in v.BINARY:
            return v.Binary(op, expression(left, names), expression(right, names))
    raise Unreadable(node, f"expected a number, found {describe(node)}")


def _call(node: ast.Apply, names: Names, functions: Mapping[str, Function] | None = None) -> v.Expr:
    name = node.function.id
    functions = names.functions if functions is None else functions
    if name not in functions:
        message = f"there is no function `{name}`"
        help = names.help_for_function(name) or suggest(name, functions)
        raise Unreadable(node.function, "", "unknown-function", help, message)
    function = functions[name]
    order = list(function.arguments)
    many = "numbers" in function.arguments.values()
    given: dict[str, v.Expr] = {}
    args: list[v.Expr] = []
    for argument in node.arguments:
        if argument.name is None:
            if not many and len(args) >= function.positional:
                count = function.positional
                only = f"only {count}" if count else "no"
                text = f"`{name}` takes {only} argument{'s' * (count != 1)} without a name"
                listing = f"the arguments are {', '.join(f'`{k}`' for k in order)}"
                all_given = len(order) == function.positional
                raise Unreadable(
                    argument.value,
                    f"`{name}` takes {len(order)} argument{'s' * (len(order) != 1)}"
                    if all_given
                    else text,
                    help=listing if all_given else f"write its name: {listing}",
                )
            key = order[0] if many else order[len(args)]
        else:
            key = argument.name.id
            if key in order and not function.schedule:
                text = f"`{name}` takes its arguments without names"
                raise Unreadable(argument.name, text, help=f"write `{name}(...)`")
            if key not in order:
                help = (
                    suggest(key, order) or f"the arguments are {', '.join(f'`{k}`' for k in order)}"
                )
                raise Unreadable(argument.name, f"`{name}` has no argument `{key}`", help=help)
        if key in given and not many:
            raise Unreadable(argument.value, f"`{key}` is given twice")
        value = _read_argument(argument.value, function.arguments[key], names)
        given[key] = value
        if argument.name is None:
            args.append(value)
    missing = [key for key in order[: function.required] if key not in given]
    if missing:
        example = f"`{name}({missing[0]} = ...)`" if function.schedule else f"`{name}(...)`"
        raise Unreadable(node, f"`{name}` needs `{missing[0]}`: {example}")
    named = {a.name.id: given[a.name.id] for a in node.arguments if a.name}
    return v.Call(name, tuple(args), tuple(named.items()))


def _read_argument(node: Node, kind: ArgumentKind | CallOf, names: Names) -> v.Expr:
    if isinstance(kind, CallOf):
        return own_call(node, names, kind.noun, kind.functions, kind.example)
    if kind == "duration":
        return v.Quantity(duration(node))
    if kind == "points":
        items = node.items if isinstance(node, ast.Items) else (node,)
        return v.Items(tuple(v.Quantity(duration(item)) for item in items))
    if kind == "samples":
        size = samples(node)
        if size.unit != "samples" or size.amount < 1 or size.amount != int(size.amount):
            text = f"expected a whole number of samples such as `16 samples`, found {size}"
            raise Unreadable(node, text, "wrong-unit" if size.unit != "samples" else "bad-value")
        return v.Quantity(size)
    if kind == "plain":
        return v.Number(number(node))
    if kind == "switch":
        if not (isinstance(node, ast.Ident) and node.id in BOOLEANS):
            raise Unreadable(node, f"expected `true` or `false`, found {describe(node)}")
        return v.Name(node.id)
    if kind == "shape":
        if not (isinstance(node, ast.Ident) and node.id in SHAPES):
            raise Unreadable(node, f"expected one of {', '.join(f'`{s}`' for s in SHAPES)}")
        return v.Name(node.id)
    return expression(node, names)
