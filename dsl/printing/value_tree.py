"""Values to nodes of the tree, so that values print by the same rules as text."""

from __future__ import annotations

from typing import Any

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node
from trainc.dsl.values import value_json as v

_PAIRS = {v.Union: "|", v.Intersection: "&", v.Difference: "-"}


def to_node(value: Any) -> Node:
    """Return the node that reads as `value`."""
    match value:
        case bool():
            return ast.Ident("true" if value else "false")
        case int() | float():
            return _number(value)
        case str():
            return ast.Str(value)
        case list() | tuple():
            return ast.Items(tuple(map(to_node, value)))
        case v.Duration(amount, unit):
            return _measure(amount, unit)
        case v.Quantity(duration):
            return to_node(duration)
        case v.Range(low, high):
            return ast.Infix("..", _number(low), _number(high))
        case v.ImportPath(module, attribute):
            return ast.Str(f"{module}:{attribute}")
        case v.Scoped(number, on):
            return _number(number) if on is None else _infix("on", _number(number), on)
        case v.Number(number):
            return _number(number)
        case v.Name(name):
            return ast.Ident(name)
        case v.Items(items):
            return ast.Items(tuple(map(to_node, items)))
        case v.Call(function, args, kwargs):
            plain = (ast.Argument(None, to_node(x)) for x in args)
            named = (ast.Argument(ast.Ident(k), to_node(x)) for k, x in kwargs)
            return ast.Apply(ast.Ident(function), (*plain, *named))
        case v.Unary(op, x):
            return ast.Prefix("-" if op == "neg" else op, to_node(x))
        case v.Binary(op, left, right):
            return _infix(op, left, right)
        case v.Glob(pattern):
            return ast.Str(pattern)
        case v.OfType(names):
            return _call("type", *map(ast.Ident, names))
        case v.Ndim(n):
            return _call("ndim", _number(n))
        case v.Role(name):
            return _call("role", ast.Ident(name))
        case v.DepthRange(low, high):
            return _call("depth", ast.Infix("..", _number(low), _number(high)))
        case v.All():
            return ast.Ident("all")
        case v.Trainable():
            return ast.Ident("trainable")
        case v.Where(selector, condition):
            return _infix("where", selector, condition)
        case v.Union(left, right) | v.Intersection(left, right) | v.Difference(left, right):
            return _infix(_PAIRS[type(value)], left, right)
        case v.Expect(selector, count):
            return _infix("expect", selector, count)
    raise TypeError(f"{value!r} is not a value of the language")


def _infix(op: str, left: Any, right: Any) -> Node:
    first = left if isinstance(left, ast.Num | ast.Prefix) else to_node(left)
    return ast.Infix(op, first, to_node(right))


def _call(function: str, *arguments: Node) -> Node:
    return ast.Apply(ast.Ident(function), tuple(ast.Argument(None, x) for x in arguments))


def _number(value: float) -> Node:
    size = ast.Num(repr(abs(value)))
    return ast.Prefix("-", size) if value < 0 else size


def _measure(amount: float, unit: str) -> Node:
    if unit == "run":
        return ast.Measure(ast.Num(_percent(amount)), "%")
    one = unit[:-1] if amount == 1 else unit
    return ast.Measure(ast.Num(repr(abs(amount))), one)


def _percent(amount: float) -> str:
    """Return a hundred times a number, exactly as its digits say."""
    from decimal import Decimal

    exact = (Decimal(repr(abs(amount))) * 100).normalize()
    short = format(exact, "f")
    return short if len(short) <= 20 else str(exact).lower()
