"""Find norms in ATen graphs: as one operator, or written out in elementary operators.

Each way to write a norm is a pattern; its match starts from one operator of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from trainc.compiler.graph.forward_graph import CAST, strip_casts
from trainc.compiler.passes.arithmetic_patterns import (
    ADD,
    MEAN,
    MUL,
    POWER,
    RSQRT,
    SQRT,
    VARIANCE,
    arguments,
    is_biased_variance,
    minus_mean,
    numerator,
    one_plus,
    other_operand,
    over_last_dim,
    plus_number,
    squared_operand,
    value_of,
)

aten = torch.ops.aten

LAYER_NORM = {F.layer_norm, torch.layer_norm, aten.layer_norm.default}
NATIVE_LAYER_NORM = {torch.native_layer_norm, aten.native_layer_norm.default}
RMS_NORM = {F.rms_norm, torch.rms_norm, aten.rms_norm.default}

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
    if node.target in RMS_NORM:
        given = arguments(node, ("input", "normalized_shape", "weight", "eps"))
        x, shape = given["input"], tuple(given["normalized_shape"])
        return NormCall("rms", x, shape, given.get("weight"), None, given.get("eps"), "none", node)
    if node.target not in LAYER_NORM | NATIVE_LAYER_NORM:
        return None
    given = arguments(node, ("input", "normalized_shape", "weight", "bias", "eps"))
    result = node
    if node.target in NATIVE_LAYER_NORM:
        read = [user for user in node.users if user.users]
        if len(read) != 1 or read[0].target is not operator.getitem or read[0].args[1] != 0:
            return None
        result = read[0]
    x, shape, eps = given["input"], tuple(given["normalized_shape"]), given.get("eps", 1e-5)
    return NormCall("layer", x, shape, given.get("weight"), given.get("bias"), eps, "none", result)


def _written_out_call(node: fx.Node) -> NormCall | None:
    """Match `c * rsqrt(v + eps)` or `c / sqrt(v + eps)` and read the rest of the norm around it."""
    inverse = node.target in RSQRT or (node.target in POWER and node.args[1] == -0.5)
    if not inverse and node.target not in SQRT:
        return None
    variance, eps = plus_number(node.args[0])
    if variance is None or eps is None:
        return None
    for product in node.users:
        centred = other_operand(product, node, MUL) if inverse else numerator(product, node)
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
    if variance.target in VARIANCE:
        same = (
            origin is not None
            and strip_casts(variance.args[0]) is origin
            and is_biased_variance(variance)
        )
        return ("layer", origin) if same and origin is not None else None
    if variance.target not in MEAN or not over_last_dim(variance):
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
    factor = other_operand(user, result, MUL) if user is not None else None
    casting: Casting | None = None
    offset = None if rounded or layer_type == "layer" else one_plus(factor)
    if user is not None and _is_affine(offset, shape):
        weight, casting = offset, "gemma"
        result, _ = _through_casts(user)
    elif user is not None and _is_affine(factor, shape):
        weight, casting, result = factor, "llama" if rounded else "none", user
        user = _only_user(result)
        shift = (
            other_operand(user, result, ADD) if user is not None and layer_type == "layer" else None
        )
        if user is not None and _is_affine(shift, shape):
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
