"""Sizes of batches that change: which axes of a batch have one, their names, and conditions on them as text."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

Size = int | str
"""A number, or the name of a size that changes from batch to batch."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a batch's tensors, by their placeholders."""
Axes = Mapping[str, Mapping[int, str]]
"""The axes that change, by placeholder: their numbers and the names of their sizes."""

EXAMPLES = "B"
"""The name of the number of examples."""

SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.truediv,
        operator.neg,
        torch.sym_max,
        torch.sym_min,
        torch.sym_float,
    )
}
"""The functions by which a graph computes sizes from sizes, by name."""


def changing_axes(seen: Sequence[Shapes]) -> dict[str, dict[int, str]]:
    """Name the axes of the last of some batches that one graph for more batches must leave open.

    These are the axes of a size that was another before, and those that count the examples. Axes that had equal sizes
    in every batch share a name: `B` for the examples, `S1`, `S2` ... for others. A size of 1 stays a number, since
    tensors are expanded along such an axis. Empty where two of the sizes are equal in the last batch alone: a graph
    that is captured with it would take them for one.
    """
    *_, last = seen
    examples = tuple(_first_targets(shapes)[0] for shapes in seen)
    names = {examples: EXAMPLES}
    axes: dict[str, dict[int, str]] = {}
    for tensor, shape in last.items():
        for axis, size in enumerate(shape):
            history = tuple(shapes[tensor][axis] for shapes in seen)
            if size > 1 and (history == examples or len(set(history)) > 1):
                name = names.setdefault(history, f"S{len(names)}")
                axes.setdefault(tensor, {})[axis] = name
    used = {name for named in axes.values() for name in named.values()}
    sizes = [history[-1] for history, name in names.items() if name in used]
    return axes if len(set(sizes)) == len(sizes) else {}


def _first_targets(shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of the targets, or of the first of several."""
    return next(shape for name, shape in shapes.items() if name.startswith("targets"))


def same_size(one: Any, other: Any) -> bool:
    """Say whether two sizes are equal in every batch; asking about symbols sets no condition on them."""
    return bool(_expression(one) == _expression(other))


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Say whether two shapes are equal in every batch."""
    return len(one) == len(other) and all(map(same_size, one, other))


def size_at_capture(size: Any) -> int:
    """Return a size in the batch that a graph is captured with."""
    return size if isinstance(size, int) else int(size.node.hint)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


Condition = Callable[[Mapping[str, int]], Any]

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@lru_cache(maxsize=4096)
def condition(text: str) -> Condition:
    """Read a condition on sizes, such as `B*S1 <= 64`, as a function of the sizes by name.

    It may hold whole numbers, names, `+ - * // %`, comparisons, `and`, `or`, `not`, `min` and `max`. Raises ValueError
    for anything else.
    """
    try:
        return _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, RecursionError) as error:
        raise ValueError(f"`{text}` is not a condition on sizes") from error


def _read(node: ast.expr) -> Condition:
    match node:
        case ast.Constant(value=bool() | int() as value):
            return lambda sizes: value
        case ast.Name(id=name):
            return lambda sizes: sizes[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _read(operand)
            return lambda sizes: not inner(sizes)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _read(operand)
            return lambda sizes: -inner(sizes)
        case ast.BinOp(left=left, op=op, right=right):
            return _of_two(_ARITHMETIC[type(op)], left, right)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _of_two(_COMPARISONS[type(op)], left, right)
        case ast.BoolOp(op=op, values=values):
            parts = [_read(value) for value in values]
            together = all if isinstance(op, ast.And) else any
            return lambda sizes: together(part(sizes) for part in parts)
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=arguments, keywords=[]):
            given = [_read(argument) for argument in arguments]
            function: Callable[..., Any] = {"min": min, "max": max}[name]
            return lambda sizes: function(part(sizes) for part in given)
    raise SyntaxError(f"{type(node).__name__} is no part of a condition")


def _of_two(function: Callable[[Any, Any], Any], left: ast.expr, right: ast.expr) -> Condition:
    one, two = _read(left), _read(right)
    return lambda sizes: function(one(sizes), two(sizes))
