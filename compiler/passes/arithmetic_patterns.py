"""Match elementary arithmetic in ATen graphs, such as `x + 1e-5` and `x - mean(x)`."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import strip_casts

aten = torch.ops.aten

MUL = {aten.mul.Tensor, operator.mul, torch.mul}
ADD = {aten.add.Tensor, aten.add.Scalar, operator.add, torch.add}
SUB = {aten.sub.Tensor, operator.sub, torch.sub}
DIV = {aten.div.Tensor, operator.truediv, torch.div}
MEAN = {aten.mean.dim, torch.mean}
SQUARE = {aten.square.default, torch.square}
POWER = {aten.pow.Tensor_Scalar, operator.pow, torch.pow}
RSQRT = {aten.rsqrt.default, torch.rsqrt}
SQRT = {aten.sqrt.default, torch.sqrt}
VARIANCE = {aten.var.correction, aten.var.dim, torch.var}


def arguments(node: fx.Node, names: Iterable[str]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def value_of(node: fx.Node) -> Tensor:
    """Return the fake tensor that a node gives."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def other_operand(node: fx.Node | None, one: fx.Node, targets: set[Any]) -> Any:
    """Return the operand beside `one` of a commutative operator."""
    if node is None or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    return right if left is one else left


def numerator(node: fx.Node, denominator: fx.Node) -> Any:
    """Return `x` for `x / denominator`."""
    fits = (
        node.target in DIV
        and len(node.args) == 2
        and node.args[1] is denominator
        and not node.kwargs
    )
    return node.args[0] if fits else None


def plus_number(node: Any) -> tuple[Any, float | None]:
    """Return `x` and the number for `x + number`."""
    node = strip_casts(node)
    if (
        not isinstance(node, fx.Node)
        or node.target not in ADD
        or len(node.args) != 2
        or node.kwargs
    ):
        return None, None
    for value, number in (node.args, node.args[::-1]):
        if isinstance(number, (int, float)):
            return value, float(number)
    return None, None


def one_plus(node: Any) -> Any:
    """Return the weight of `1 + weight`, from before any cast."""
    value, number = plus_number(node)
    return strip_casts(value) if number == 1 else None


def squared_operand(node: Any) -> Any:
    """Return `x` for `x * x`, from before any cast."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in SQUARE or (node.target in POWER and node.args[1] == 2):
        return strip_casts(node.args[0])
    if node.target in MUL and node.args[0] is node.args[1]:
        return strip_casts(node.args[0])
    return None


def minus_mean(node: fx.Node) -> fx.Node | None:
    """Return `x` for `x - mean(x)`."""
    if node.target not in SUB or len(node.args) != 2 or node.kwargs:
        return None
    x, mean = strip_casts(node.args[0]), strip_casts(node.args[1])
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node) or mean.target not in MEAN:
        return None
    return x if strip_casts(mean.args[0]) is x and over_last_dim(mean) else None


def over_last_dim(node: fx.Node, names: tuple[str, ...] = ("input", "dim", "keepdim")) -> bool:
    """Say whether a reduction runs over the last dim and keeps it."""
    given = arguments(node, names)
    dims, rank = given.get("dim"), value_of(strip_casts(given["input"])).dim()
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return [d % rank for d in dims] == [rank - 1] and bool(given.get("keepdim", False))


def is_biased_variance(node: fx.Node) -> bool:
    """Say whether a variance is the mean of squares, over the last dim, which it keeps."""
    names: tuple[str, ...] = ("input", "dim")
    if node.target is aten.var.dim:
        names = ("input", "dim", "unbiased", "keepdim")
    given = arguments(node, names)
    biased = given.get("correction") == 0 or given.get("unbiased") is False
    return biased and over_last_dim(node, names)
