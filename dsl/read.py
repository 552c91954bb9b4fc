"""Nodes of the tree to values: what an expression means where it stands."""

from __future__ import annotations

from typing import Any, Protocol

from trainc.dsl import ast
from trainc.dsl import values as v
from trainc.dsl.ast import Node
from trainc.dsl.diagnostics import suggest
from trainc.dsl.functions import FUNCTIONS, SHAPES, STATES
from trainc.dsl.source import Span

_UNITS = {"%": "run"} | {f"{u}{s}": f"{u}s" for u in ("step", "sample", "token", "epoch", "second") for s in ("", "s")}
_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_LOGIC = ("and", "or")


class Unreadable(Exception):
    """A node does not mean what is wanted where it stands; `text` says what was expected."""

    def __init__(
        self, node: Node | Span, text: str, rule: str = "bad-value", help: str | None = None, message: str = ""
    ) -> None:
        super().__init__(text)
        self.span = node if isinstance(node, Span) else node.span
        self.text, self.rule, self.help, self.message = text, rule, help, message


class Names(Protocol):
    """Decides which names an expression may use."""

    def check(self, name: ast.Ident) -> None:
        """Note a name that means nothing."""


class Anything:
    """Lets every name pass; a whole spec is checked later."""

    def check(self, name: ast.Ident) -> None:
        """Accept the name."""


ANYTHING = Anything()


def number_of(node: ast.Num) -> float:
    """Return what a number's text means: an int where it is written as one."""
    text = node.text.replace("_", "")
    factor = _SUFFIXES.get(text[-1], 1)
    digits = text[:-1] if factor > 1 else text
    if len(digits) > 400:
        raise Unreadable(node, "the number is too long")
    value = int(digits) if digits.isdigit() else float(digits)
    product = value * factor
    if abs(product) > 1e300:
        raise Unreadable(node, "the number is too large")
    whole = factor > 1 and product == int(product)
    return int(product) if whole else product


def constant(node: Node) -> float | v.Duration:
    """Return the number or duration that an expression without names amounts to."""
    match node:
        case ast.Num():
            return number_of(node)
        case ast.Measure(number, "%"):
            exact = number.text.replace("_", "")
            plain = exact[-1].isdigit() and "e" not in exact.lower()
            number_of(number)
            return v.Duration(float(f"{exact}e-2") if plain else number_of(number) / 100, "run")
        case ast.Measure(number, unit):
            return v.Duration(number_of(number), _UNITS[unit])
        case ast.Prefix("-", operand):
            return _arithmetic(node, "*", -1, constant(operand))
        case ast.Infix("+" | "-" | "*" | "/" as op, left, right):
            return _arithmetic(node, op, constant(left), constant(right))
    raise Unreadable(node, f"expected a number, found {describe(node)}")


def _arithmetic(node: Node, op: str, left: float | v.Duration, right: float | v.Duration) -> float | v.Duration:
    a = left.amount if isinstance(left, v.Duration) else left
    b = right.amount if isinstance(right, v.Duration) else right
    units = [x.unit for x in (left, right) if isinstance(x, v.Duration)]
    if op in "+-" and len(units) == 1 or len(set(units)) > 1:
        raise Unreadable(node, "the two sides have different units", "wrong-unit")
    if op == "*" and len(units) == 2:
        raise Unreadable(node, "a duration times a duration is not a duration", "wrong-unit")
    if op == "/" and (b == 0 or (units and not isinstance(left, v.Duration))):
        raise Unreadable(node, "this cannot be divided", "bad-value" if b == 0 else "wrong-unit")
    whole = isinstance(a, int) and isinstance(b, int)
    if op == "/":
        value = a // b if whole and a % b == 0 else a / b
    else:
        value = a + b if op == "+" else a - b if op == "-" else a * b
    if abs(value) > 1e300:
        raise Unreadable(node, "the number is too large")
    pure = not units or (op == "/" and len(units) == 2)
    return value if pure else v.Duration(value, units[0])


def number(node: Node) -> float:
    """Return a plain number; a percentage is one too."""
    value = constant(node)
    if not isinstance(value, v.Duration):
        return value
    if value.unit == "run":
        return value.amount
    raise Unreadable(node, f"expected a plain number, found {value.unit}", "wrong-unit")


def duration(node: Node) -> v.Duration:
    """Return a duration that is not negative."""
    value = constant(node) if isinstance(node, ast.Num | ast.Measure | ast.Prefix | ast.Infix) else None
    if value is None:
        raise Unreadable(node, f"expected a duration such as `200 steps`, found {describe(node)}")
    if not isinstance(value, v.Duration):
        help = f"write a unit: `{value:g} steps`" if value == value else None
        raise Unreadable(node, "expected a duration, found a bare number", "wrong-unit", help)
    if value.amount < 0:
        raise Unreadable(node, "a duration is not negative")
    return value


def interval(node: Node) -> v.Range:
    """Return a range."""
    if not (isinstance(node, ast.Infix) and node.op == ".."):
        raise Unreadable(node, f"expected a range such as `0.5..1.5`, found {describe(node)}")
    low, high = number(node.left), number(node.right)
    if low > high:
        raise Unreadable(node, "this range ends before it begins", help=f"write `{high:g}..{low:g}`")
    return v.Range(low, high)


def import_path(node: Node) -> v.ImportPath:
    """Return an import path."""
    if not isinstance(node, ast.Str):
        raise Unreadable(node, f'expected a string such as "module:name", found {describe(node)}')
    module, colon, attribute = node.value.partition(":")
    if not colon:
        module, _, attribute = node.value.rpartition(".")
        help = f'write "{module}:{attribute}"' if module and attribute else None
        raise Unreadable(node, 'expected "module:name", with a colon', help=help)
    try:
        return v.ImportPath(module, attribute)
    except ValueError as error:
        raise Unreadable(node, str(error)) from None


def plain(node: Node) -> Any:
    """Return a JSON value: a number, string, boolean, list; a name is a string, a range a pair."""
    match node:
        case ast.Str(value):
            return value
        case ast.Ident("true" | "false" as word):
            return word == "true"
        case ast.Ident(name):
            return name
        case ast.Items(items):
            return [plain(item) for item in items]
        case ast.Infix("..", _, _):
            pair = interval(node)
            return [pair.low, pair.high]
        case ast.Num() | ast.Measure() | ast.Prefix("-", _) | ast.Infix("+" | "-" | "*" | "/", _, _):
            return number(node)
    raise Unreadable(node, f"expected a plain value, found {describe(node)}")


# Expressions ---------------------------------------------------------------------------------


def expression(node: Node, names: Names = ANYTHING) -> v.Expr:
    """Return an expression with a number as its value."""
    value = _expression(node, names)
    if is_condition(value):
        raise Unreadable(node, "expected a number, found a condition")
    return value


def condition(node: Node, names: Names = ANYTHING) -> v.Expr:
    """Return a condition."""
    value = _expression(node, names)
    if not is_condition(value):
        raise Unreadable(node, "expected a condition such as `loss > 2`, found a number")
    return value


def schedule(node: Node, names: Names = ANYTHING) -> v.Expr:
    """Return a schedule; a lone percentage is the number it stands for."""
    value = expression(node, names)
    if isinstance(value, v.Quantity) and value.duration.unit != "run":
        raise Unreadable(node, f"expected a schedule or a number, found {value.duration.unit}", "wrong-unit")
    return v.Number(value.duration.amount) if isinstance(value, v.Quantity) else value


def is_condition(value: v.Expr) -> bool:
    """Say whether an expression is true or false rather than a number."""
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
        case ast.Infix(op, left, right) if op in v.BINARY:
            return v.Binary(op, expression(left, names), expression(right, names))
    raise Unreadable(node, f"expected a number, found {describe(node)}")


def _call(node: ast.Apply, names: Names) -> v.Expr:
    name = node.function.id
    if name not in FUNCTIONS:
        message = f"there is no function `{name}`"
        raise Unreadable(node.function, "", "unknown-function", suggest(name, FUNCTIONS), message)
    function = FUNCTIONS[name]
    order = list(function.arguments)
    many = "numbers" in function.arguments.values()
    given: dict[str, v.Expr] = {}
    args: list[v.Expr] = []
    for argument in node.arguments:
        if argument.name is None:
            if not many and len(args) >= function.positional:
                count = function.positional
                text = f"`{name}` takes {count or 'no'} argument{'s' * (count != 1)} without a name"
                raise Unreadable(argument.value, text, help=f"arguments are {', '.join(f'`{k}`' for k in order)}")
            key = order[0] if many else order[len(args)]
        else:
            key = argument.name.id
            if key not in order or not function.schedule:
                help = suggest(key, order) or f"arguments are {', '.join(f'`{k}`' for k in order)}"
                raise Unreadable(argument.name, f"`{name}` has no argument `{key}`", help=help)
        if key in given and not many:
            raise Unreadable(argument.value, f"`{key}` is given twice")
        value = _read_argument(argument.value, function.arguments[key], names)
        given[key] = value
        if argument.name is None:
            args.append(value)
    missing = [key for key in order[: function.required] if key not in given]
    if missing:
        example = f"`{name}({missing[0]} = ...)`"
        raise Unreadable(node, f"`{name}` needs `{missing[0]}`: {example}")
    named = {a.name.id: given[a.name.id] for a in node.arguments if a.name}
    return v.Call(name, tuple(args), tuple(named.items()))


def _read_argument(node: Node, kind: str, names: Names) -> v.Expr:
    if kind == "duration":
        return v.Quantity(duration(node))
    if kind == "points":
        items = node.items if isinstance(node, ast.Items) else (node,)
        return v.Items(tuple(v.Quantity(duration(item)) for item in items))
    if kind == "shape":
        if not (isinstance(node, ast.Ident) and node.id in SHAPES):
            raise Unreadable(node, f"expected one of {', '.join(f'`{s}`' for s in SHAPES)}")
        return v.Name(node.id)
    return expression(node, names)


def describe(node: Node) -> str:
    """Return what a node is called in messages."""
    match node:
        case ast.Num():
            return "a number"
        case ast.Measure(_, unit):
            return "a percentage" if unit == "%" else f"a duration in {_UNITS[unit]}"
        case ast.Str():
            return "a string"
        case ast.Ident("true" | "false"):
            return "a boolean"
        case ast.Ident(name):
            return f"the name `{name}`"
        case ast.Apply(function, _):
            return f"`{function.id}(...)`"
        case ast.Items():
            return "a list"
        case ast.Infix("..", _, _):
            return "a range"
        case ast.Infix("on", _, _):
            return "a value for a part of the parameters"
        case ast.Infix("|" | "&" | "where" | "expect", _, _):
            return "a selector"
        case ast.Prefix("not", _):
            return "a condition"
        case ast.Infix(op, _, _) if op in (*_LOGIC, *v.COMPARISONS):
            return "a condition"
    return "an expression"
