"""Find norms in ATen graphs: as one operator, or written out in elementary operators.

Each way to write a norm is a pattern; its match starts from one operator of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import CAST, arguments, strip_casts
from trainc.compiler.patterns.arithmetic import (
    POWER,
    is_biased_variance,
    is_mean,
    minus_mean,
    numerator,
    one_plus,
    other_operand,
    plus_number,
    squared_operand,
    value_of,
)

aten = torch.ops.aten

Casting = Literal["none", "llama", "gemma"]


@dataclass(frozen=True, slots=True)
class NormCall:
    """One application of a norm: its input, affine tensors, and the node that holds its result.

    `casting` is None where the pattern rounds nothing, so that either casting of the plain weight gives the same
    numbers; a pattern that multiplies by `1 + weight` is "gemma" whatever it rounds.
    """

    layer_type: Literal["layer", "rms"]
    x: fx.Node
    shape: tuple[int, ...]
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float | None
    casting: Casting | None
    result: fx.Node


def norm_calls(graph: fx.Graph) -> Iterator[NormCall]:
    """Yield every norm in a graph, in order, whatever its pattern."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        found = _operator_call(node) or _written_out_call(node)
        if found is not None:
            yield found


def _operator_call(node: fx.Node) -> NormCall | None:
    layer_type: Literal["layer", "rms"] = "rms" if node.target is aten.rms_norm.default else "layer"
    result = node
    if node.target is aten.native_layer_norm.default:
        read = [user for user in node.users if user.users]
        if len(read) != 1 or read[0].target is not operator.getitem or read[0].args[1] != 0:
            return None
        result = read[0]
    elif node.target not in (aten.rms_norm.default, aten.layer_norm.default):
        return None
    given = arguments(node)
    x, shape, weight = given["input"], tuple(given["normalized_shape"]), given["weight"]
    return NormCall(layer_type, x, shape, weight, given.get("bias"), given["eps"], "none", result)


def _written_out_call(node: fx.Node) -> NormCall | None:
    """Match `c * rsqrt(v + eps)` or `c / sqrt(v + eps)` and read the rest of the norm around it."""
    inverse = node.target is aten.rsqrt.default or (node.target is POWER and node.args[1] == -0.5)
    if not inverse and node.target is not aten.sqrt.default:
        return None
    variance, eps = plus_number(node.args[0])
    if variance is None or eps is None:
        return None
    for product in node.users:
        centred = (
            other_operand(product, node, aten.mul.Tensor) if inverse else numerator(product, node)
        )
        if centred is None:
            continue
        source = _normalised(strip_casts(centred), strip_casts(variance))
        if source is not None:
            layer_type, x = source
            return _around(layer_type, x, eps, product)
    return None


def _normalised(centred: Any, variance: Any) -> tuple[Literal["layer", "rms"], fx.Node] | None:
    """Return the type of norm and the input, given the numerator and the variance of a written-out norm."""
    if not isinstance(centred, fx.Node) or not isinstance(variance, fx.Node):
        return None
    origin = minus_mean(centred)
    if variance.target in (aten.var.correction, aten.var.dim):
        same = strip_casts(variance.args[0]) is origin and is_biased_variance(variance)
        return ("layer", origin) if origin is not None and same else None
    if not is_mean(variance):
        return None
    squared = squared_operand(strip_casts(variance.args[0]))
    if squared is None:
        return None
    if squared is centred and origin is None:
        return "rms", centred
    if origin is not None and (squared is centred or minus_mean(squared) is origin):
        return "layer", origin
    return None


def _around(
    layer_type: Literal["layer", "rms"], x: fx.Node, eps: float, product: fx.Node
) -> NormCall:
    """Return the norm with the weight, the bias and the casts that follow the normalised value."""
    shape = (value_of(x).shape[-1],)
    result, rounded = _through_casts(product)
    weight = bias = None
    user = _only_user(result)
    factor = other_operand(user, result, aten.mul.Tensor)
    casting: Casting | None = None
    offset = None if rounded or layer_type == "layer" else one_plus(factor)
    if user is not None and _is_affine(offset, shape):
        weight, casting = offset, "gemma"
        result, _ = _through_casts(user)
    elif user is not None and _is_affine(factor, shape):
        weight, casting, result = factor, "llama" if rounded else "none", user
        user = _only_user(result)
        shift = other_operand(user, result, aten.add.Tensor)
        if user is not None and layer_type == "layer" and _is_affine(shift, shape):
            bias, result = shift, user
        if casting == "none":
            result, _ = _through_casts(result)
    if casting != "gemma" and value_of(x).dtype in (torch.float32, torch.float64):
        casting = None
    return NormCall(layer_type, x, shape, weight, bias, eps, casting, result)


def _is_affine(node: Any, shape: tuple[int, ...]) -> bool:
    origin = strip_casts(node)
    return (
        isinstance(origin, fx.Node)
        and origin.op == "get_attr"
        and tuple(value_of(origin).shape) == shape
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _through_casts(node: fx.Node) -> tuple[fx.Node, bool]:
    cast = False
    while (user := _only_user(node)) is not None and user.target in CAST and user.args[0] is node:
        node, cast = user, True
    return node, cast
