"""Nodes of the tree to selectors, and to numbers for a selection of parameters."""

from __future__ import annotations

from collections.abc import Callable

from trainc.dsl.reading.constants import Unreadable, describe, number, number_range
from trainc.dsl.reading.expressions import Names, condition
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.vocabulary import ROLES, SELECTOR_FUNCTIONS, SELECTOR_WORDS, WHERE_NAMES
from trainc.dsl.values import value_json as v

_PAIRS = {pair.op: pair for pair in (v.Union, v.Intersection, v.Difference)}


class _WhereNames(Names):
    """The names of a `where` condition."""

    def check(self, name: ast.Ident) -> None:
        if name.id not in WHERE_NAMES:
            known = f"a condition after `where` may use {', '.join(f'`{n}`' for n in WHERE_NAMES)}"
            help = suggest(name.id, WHERE_NAMES) or known
            raise Unreadable(
                name, "", "unknown-name", help, f"`{name.id}` cannot be used after `where`"
            )


def selector(node: Node) -> v.Selector:
    """Return a selector."""
    match node:
        case ast.Str(pattern):
            return _glob(node, pattern)
        case ast.Ident("all"):
            return v.All()
        case ast.Ident("trainable"):
            return v.Trainable()
        case ast.Ident("matrices"):
            return v.Matrices()
        case ast.Ident(name):
            message, near = f"there is no selector `{name}`", suggest(name, SELECTOR_WORDS)
            written = f"type({name})" if name[0].isupper() and "." not in name else f'"{name}"'
            what = "classes as `type(...)`" if written[0] == "t" else "names in quotes"
            help = near or f"write {what}: `{written}`"
            edit = None if near else written
            raise Unreadable(node, "", "unknown-name", help, message, edit)
        case ast.Apply():
            return _function(node)
        case ast.Infix("|" | "&" | "-" as op, left, right):
            return _PAIRS[op](selector(left), selector(right))
        case ast.Infix("where", left, right):
            return v.Where(selector(left), condition(right, _WhereNames()))
        case ast.Infix("expect", left, ast.Num() as count):
            return v.Expect(selector(left), _whole(count, 0))
        case ast.Infix("and" | "or" as op, _, _):
            word = "&" if op == "and" else "|"
            first, second = node.left.span, node.right.span
            at = node.span.part(first.end - node.span.start, second.start - node.span.start)
            text = f"`{op}` joins conditions, not selectors"
            raise Unreadable(
                at, text, help=f"write `{word}`", edit=at.text.replace(op, word), safe=True
            )
    raise Unreadable(
        node, f'expected a selector such as "blocks.*" or `type(Linear)`, found {describe(node)}'
    )


def scoped_numbers(node: Node) -> tuple[v.Scoped, ...]:
    """Return numbers with the selection each is for: `0.1 on mats`, or a list of such."""
    if isinstance(node, ast.Items):
        return tuple(scoped for item in node.items for scoped in scoped_numbers(item))
    if isinstance(node, ast.Infix) and node.op == "on":
        return (v.Scoped(_from_zero(node.left), selector(node.right)),)
    return (v.Scoped(_from_zero(node)),)


def scoped_expressions(
    node: Node, names: Names, read: Callable[[Node, Names], v.Expr], *, pairs: bool = False
) -> v.Expr | tuple[v.Scoped, ...]:
    """Return what `read` makes of a node, or a list of such with the selection that each is for.

    With `pairs` what `read` takes is a list itself.
    """
    if isinstance(node, ast.Infix) and node.op == "on":
        return (v.Scoped(read(node.left, names), selector(node.right)),)
    if not isinstance(node, ast.Items) or (pairs and not any(map(_is_scoped, node.items))):
        return read(node, names)
    entries = (scoped_expressions(item, names, read, pairs=pairs) for item in node.items)
    return tuple(x[0] if isinstance(x, tuple) else v.Scoped(x) for x in entries)


def _is_scoped(node: Node) -> bool:
    return isinstance(node, ast.Infix) and node.op == "on"


def _from_zero(node: Node) -> float:
    """Return a number, 0 or more."""
    value = number(node)
    if value < 0:
        raise Unreadable(node, f"expected 0 or more, found {value:g}")
    return value


def _glob(node: Node, pattern: str) -> v.Selector:
    if not pattern:
        raise Unreadable(
            node, "an empty pattern matches nothing", help="write `all` for everything"
        )
    if any(c.isspace() for c in pattern):
        raise Unreadable(
            node, "a pattern cannot contain spaces", help='join patterns with `|`: "a.*" | "b.*"'
        )
    return v.Glob(pattern)


def _function(node: ast.Apply) -> v.Selector:
    name = node.function.id
    if name not in SELECTOR_FUNCTIONS:
        help = (
            suggest(name, SELECTOR_FUNCTIONS)
            or f"selectors are {', '.join(f'`{s}(...)`' for s in SELECTOR_FUNCTIONS)}"
        )
        raise Unreadable(
            node.function, "", "unknown-function", help, f"there is no selector `{name}(...)`"
        )
    if any(argument.name for argument in node.arguments) or not node.arguments:
        raise Unreadable(node, f"expected arguments as in {_USAGE[name]}")
    values = [argument.value for argument in node.arguments]
    if name == "type":
        return v.OfType(tuple(_type_name(value) for value in values))
    if len(values) > 1:
        raise Unreadable(values[1], f"expected one argument, as in {_USAGE[name]}")
    if name == "ndim":
        return v.Ndim(_whole(values[0], 0))
    if name == "depth":
        return _depth(values[0])
    return _role(values[0])


_USAGE = {
    "type": "`type(Linear, Conv2d)`",
    "ndim": "`ndim(2)`",
    "role": f"`role(...)` with one of {', '.join(ROLES)}",
    "depth": "`depth(0..0.5)`",
}


def _type_name(node: Node) -> str:
    if isinstance(node, ast.Ident | ast.Str):
        return node.id if isinstance(node, ast.Ident) else node.value
    raise Unreadable(node, f"expected the name of a class, found {describe(node)}")


def _depth(node: Node) -> v.Selector:
    span = number_range(node)
    if not 0 <= span.low <= span.high <= 1:
        raise Unreadable(
            node, "expected a range between 0 and 1: depth is 0 at the input and 1 at the head"
        )
    return v.DepthRange(span.low, span.high)


def _role(node: Node) -> v.Selector:
    if not (isinstance(node, ast.Ident) and node.id in ROLES):
        roles = f"expected a role: {', '.join(f'`{r}`' for r in ROLES)}"
        help = suggest(node.id, ROLES) if isinstance(node, ast.Ident) else None
        raise Unreadable(node, roles, help=help)
    return v.Role(node.id)


def _whole(node: Node, least: int) -> int:
    value = number(node)
    if value != int(value) or value < least:
        raise Unreadable(node, f"expected a whole number, {least} or more")
    return int(value)
