"""Match elementary arithmetic in ATen graphs, such as `x + 1e-5` and `x - mean(x)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import arguments, strip_casts

aten = torch.ops.aten

POWER = aten.pow.Tensor_Scalar


def value_of(node: fx.Node) -> Tensor:
    """Return the fake tensor that a node gives."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _operands(node: Any, *operators: Any) -> tuple[Any, ...]:
    """Return the two operands of a call of one of the operators; none for any other node."""
    if not isinstance(node, fx.Node) or node.target not in operators or node.kwargs:
        return ()
    return node.args if len(node.args) == 2 else ()


def other_operand(node: fx.Node | None, one: fx.Node, operator: Any) -> Any:
    """Return the operand of a commutative operator that is not `one`."""
    left, right = _operands(node, operator) or (None, None)
    return right if left is one else left


def numerator(node: fx.Node, denominator: fx.Node) -> Any:
    """Return `x` for `x / denominator`."""
    x, divisor = _operands(node, aten.div.Tensor) or (None, None)
    return x if divisor is denominator else None


def plus_number(node: Any) -> tuple[Any, float | None]:
    """Return `x` and the number for `x + number`."""
    operands = _operands(strip_casts(node), aten.add.Tensor, aten.add.Scalar)
    for value, number in zip(operands, operands[::-1], strict=True):
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
    if node.target is aten.square.default or (node.target is POWER and node.args[1] == 2):
        return strip_casts(node.args[0])
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        return strip_casts(node.args[0])
    return None


def minus_mean(node: fx.Node) -> fx.Node | None:
    """Return `x` for `x - mean(x)`."""
    x, mean = map(strip_casts, _operands(node, aten.sub.Tensor) or (None, None))
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node):
        return None
    return x if is_mean(mean) and strip_casts(mean.args[0]) is x else None


def is_mean(node: fx.Node) -> bool:
    """Say whether a node is a mean over the last dim, which it keeps."""
    return node.target is aten.mean.dim and _over_last_dim(node)


def is_biased_variance(node: fx.Node) -> bool:
    """Say whether a variance is the mean of squares, over the last dim, which it keeps."""
    given = arguments(node)
    biased = given.get("correction") == 0 or given.get("unbiased") is False
    return biased and _over_last_dim(node)


def _over_last_dim(node: fx.Node) -> bool:
    given = arguments(node)
    rank = value_of(strip_casts(node.args[0])).dim()
    return given["keepdim"] and [dim % rank for dim in given["dim"] or ()] == [rank - 1]
