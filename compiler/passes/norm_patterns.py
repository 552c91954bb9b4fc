"""How norms are spelled in ATen graphs, and matchers anchored on one operator of each spelling."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

LAYER_NORM = {F.layer_norm, torch.layer_norm, aten.layer_norm.default}
NATIVE_LAYER_NORM = {torch.native_layer_norm, aten.native_layer_norm.default}
RMS_NORM = {F.rms_norm, torch.rms_norm, aten.rms_norm.default}

CAST = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
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


Casting = Literal["none", "llama", "gemma"]


@dataclass(frozen=True, slots=True)
class NormCall:
    """One application of a norm: its input, affine tensors, and the node that holds its result.

    `casting` is None where the spelling rounds nothing, so that either casting of the plain weight gives the same
    numbers; one that multiplies by `1 + weight` is "gemma" whatever it rounds.
    """

    form: Literal["layer", "rms"]
    x: fx.Node
    shape: tuple[int, ...]
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float | None
    casting: Casting | None
    result: fx.Node


def norm_calls(graph: fx.Graph) -> Iterator[NormCall]:
    """Yield every norm in a graph, in order, whatever its spelling."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        found = _operator_call(node) or _spelled_call(node)
        if found is not None:
            yield found


def strip(node: Any) -> Any:
    """Follow casts back to the value that was cast."""
    while isinstance(node, fx.Node) and node.target in CAST:
        node = node.args[0]
    return node


def _arguments(node: fx.Node, names: Iterable[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _operator_call(node: fx.Node) -> NormCall | None:
    if node.target in RMS_NORM:
        given = _arguments(node, ("input", "normalized_shape", "weight", "eps"))
        x, shape = given["input"], tuple(given["normalized_shape"])
        return NormCall("rms", x, shape, given.get("weight"), None, given.get("eps"), "none", node)
    if node.target not in LAYER_NORM | NATIVE_LAYER_NORM:
        return None
    given = _arguments(node, ("input", "normalized_shape", "weight", "bias", "eps"))
    result = node
    if node.target in NATIVE_LAYER_NORM:
        read = [user for user in node.users if user.users]
        if len(read) != 1 or read[0].target is not operator.getitem or read[0].args[1] != 0:
            return None
        result = read[0]
    x, shape, eps = given["input"], tuple(given["normalized_shape"]), given.get("eps", 1e-5)
    return NormCall("layer", x, shape, given.get("weight"), given.get("bias"), eps, "none", result)


def _spelled_call(node: fx.Node) -> NormCall | None:
    """Match `c * rsqrt(v + eps)` or `c / sqrt(v + eps)` and read the rest of the norm around it."""
    inverse = node.target in RSQRT or (node.target in POWER and node.args[1] == -0.5)
    if not inverse and node.target not in SQRT:
        return None
    variance, eps = _plus_number(node.args[0])
    if variance is None or eps is None:
        return None
    for product in node.users:
        centred = _other(product, node, MUL) if inverse else _numerator(product, node)
        if centred is None:
            continue
        source = _normalised(strip(centred), strip(variance))
        if source is not None:
            form, x = source
            return _around(form, x, eps, product)
    return None


def _normalised(centred: Any, variance: Any) -> tuple[Literal["layer", "rms"], fx.Node] | None:
    """Return the form and the input, given the numerator and the variance of a spelled-out norm."""
    if not isinstance(centred, fx.Node) or not isinstance(variance, fx.Node):
        return None
    origin = _minus_mean(centred)
    if variance.target in VARIANCE:
        same = (
            origin is not None
            and strip(variance.args[0]) is origin
            and _is_biased_variance(variance)
        )
        return ("layer", origin) if same and origin is not None else None
    if variance.target not in MEAN or not _over_last(variance):
        return None
    squared = _squared(strip(variance.args[0]))
    if squared is None:
        return None
    if squared is centred and origin is None:
        return "rms", centred
    if origin is not None and (squared is centred or _minus_mean(squared) is origin):
        return "layer", origin
    return None


def _around(form: Literal["layer", "rms"], x: fx.Node, eps: float, product: fx.Node) -> NormCall:
    """Take in the weight, the bias and the casts that follow the normalised value."""
    shape = (_value(x).shape[-1],)
    result, rounded = _through_casts(product)
    weight = bias = None
    user = _only_user(result)
    factor = _other(user, result, MUL) if user is not None else None
    casting: Casting | None = None
    offset = None if rounded or form == "layer" else _offset(factor)
    if user is not None and _is_affine(offset, shape):
        weight, casting = offset, "gemma"
        result, _ = _through_casts(user)
    elif user is not None and _is_affine(factor, shape):
        weight, casting, result = factor, "llama" if rounded else "none", user
        user = _only_user(result)
        shift = _other(user, result, ADD) if user is not None and form == "layer" else None
        if user is not None and _is_affine(shift, shape):
            bias, result = shift, user
        if casting == "none":
            result, _ = _through_casts(result)
    if casting != "gemma" and _value(x).dtype in (torch.float32, torch.float64):
        casting = None
    return NormCall(form, x, shape, weight, bias, eps, casting, result)


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _is_affine(node: Any, shape: tuple[int, ...]) -> bool:
    origin = strip(node)
    return (
        isinstance(origin, fx.Node)
        and origin.op == "get_attr"
        and tuple(_value(origin).shape) == shape
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _through_casts(node: fx.Node) -> tuple[fx.Node, bool]:
    cast = False
    while (user := _only_user(node)) is not None and user.target in CAST and user.args[0] is node:
        node, cast = user, True
    return node, cast


def _other(node: fx.Node | None, one: fx.Node, targets: set[Any]) -> Any:
    """Return the operand beside `one` of a commutative operator."""
    if node is None or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    return right if left is one else left


def _numerator(node: fx.Node, denominator: fx.Node) -> Any:
    fits = (
        node.target in DIV
        and len(node.args) == 2
        and node.args[1] is denominator
        and not node.kwargs
    )
    return node.args[0] if fits else None


def _plus_number(node: Any) -> tuple[Any, float | None]:
    node = strip(node)
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


def _offset(node: Any) -> Any:
    """Return the weight of `1 + weight`, from before any cast."""
    value, number = _plus_number(node)
    return strip(value) if number == 1 else None


def _squared(node: Any) -> Any:
    if not isinstance(node, fx.Node):
        return None
    if node.target in SQUARE or (node.target in POWER and node.args[1] == 2):
        return strip(node.args[0])
    if node.target in MUL and node.args[0] is node.args[1]:
        return strip(node.args[0])
    return None


def _minus_mean(node: fx.Node) -> fx.Node | None:
    """Return `x` for `x - mean(x)`."""
    if node.target not in SUB or len(node.args) != 2 or node.kwargs:
        return None
    x, mean = strip(node.args[0]), strip(node.args[1])
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node) or mean.target not in MEAN:
        return None
    return x if strip(mean.args[0]) is x and _over_last(mean) else None


def _over_last(node: fx.Node) -> bool:
    """Say whether a reduction runs over the last dim and keeps it."""
    given = _arguments(node, ("input", "dim", "keepdim"))
    dims, rank = given.get("dim"), _value(strip(given["input"])).dim()
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return [d % rank for d in dims] == [rank - 1] and bool(given.get("keepdim", False))


def _is_biased_variance(node: fx.Node) -> bool:
    names = (
        ("input", "dim", "unbiased", "keepdim") if node.target is aten.var.dim else ("input", "dim")
    )
    given = _arguments(node, names)
    biased = given.get("correction") == 0 or given.get("unbiased") is False
    rank = _value(strip(given["input"])).dim()
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return biased and [d % rank for d in dims] == [rank - 1] and bool(given.get("keepdim", False))
