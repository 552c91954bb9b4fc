"""Which operators give a part of their result from the same part of their operands.

A result that consists of equal blocks along an axis need be computed for one of them only. For a call and an axis of
its result `block_call` returns the call that gives one block, where it is certain that blocks of the operands are
enough for it: every operator is looked up in a table by the name of its schema, and one that is not there has none.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import arguments
from trainc.compiler.graph.sizes import same_size

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Block:
    """An operand of which one block along `axis` is taken, in place of the whole."""

    node: fx.Node
    axis: int


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A call that gives one block of a result; `args` may hold Blocks, and sizes that are symbols."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def blocks(self) -> list[Block]:
        """Return the operands of which one block is taken."""
        found: list[Block] = []

        def look(value: Any) -> None:
            if isinstance(value, Block):
                found.append(value)
            for one in value if isinstance(value, (list, tuple)) else ():
                look(one)

        look(self.args)
        look([*self.kwargs.values()])
        return found


def block_call(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Return the call that gives one of `count` equal blocks of a node's result along an axis; None if unknown."""
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        alike = index == 0 or _name(source) in _SEVERAL
        return BlockCall(operator.getitem, (Block(source, axis), index), {}) if alike else None
    rule = _pointwise if _is_pointwise(node) else _RULES.get(_name(node))
    if rule is None or shape_of(node) is None or not divides(shape_of(node)[axis], count):
        return None
    return rule(node, axis, count)


def shape_of(node: Any) -> Any:
    """Return the shape of a node's result, of several the first; None where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value.shape if isinstance(value, Tensor) else None


def divides(size: Any, count: int) -> bool:
    """Say whether a size is a multiple of a number in every batch, and not 0."""
    return same_size(size % count, 0) and not same_size(size, 0)


def _name(node: fx.Node) -> str:
    """Return the name of an operator, such as `aten::add`, without its overload; empty for other functions."""
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _changed(node: fx.Node, **changes: Any) -> BlockCall:
    """Return a node's call with other values of some arguments, by their names in the operator's schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    args = [changes.get(name, value) for name, value in zip(names, node.args, strict=False)]
    kwargs = {**node.kwargs, **{n: v for n, v in changes.items() if n not in names[: len(args)]}}
    return BlockCall(node.target, tuple(args), kwargs)


def _aligned(operand: Any, axis: int, shape: Any) -> Any:
    """Return what an operand that is broadcast to a shape gives to a block along an axis; None if that is unknown."""
    own = shape_of(operand)
    if own is None or not isinstance(operand, fx.Node):
        return operand
    at = axis - (len(shape) - len(own))
    if at < 0 or same_size(own[at], 1):
        return operand
    return Block(operand, at) if same_size(own[at], shape[axis]) else None


def _pointwise(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    shape, given = shape_of(node), arguments(node)
    tensors = {name: value for name, value in given.items() if shape_of(value) is not None}
    changes = {name: _aligned(value, axis, shape) for name, value in tensors.items()}
    return None if None in changes.values() else _changed(node, **changes)


def _like_first(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Of operators that keep the shape of their first operand, and treat every entry apart."""
    name, first = next(iter(arguments(node).items()))
    return _changed(node, **{name: Block(first, axis)})


def _dropout(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    given = arguments(node)
    draws = given["train"] and given["p"] != 0.0
    return None if draws else _like_first(node, axis, count)


def _reshape(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Entries keep their order: what stands before the axis must be as many entries before and after."""
    given, shape = arguments(node), shape_of(node)
    first = next(iter(given.values()))
    own = () if "dtype" in given else shape_of(first)  # other bits of the same memory
    for at, size in enumerate(own):
        if divides(size, count) and same_size(prod(own[:at]), prod(shape[:axis])):
            return BlockCall(
                aten.reshape.default, (Block(first, at), _shortened(shape, axis, count)), {}
            )
    return None


def _permute(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """The axis of the operand that becomes an axis is found by its size, of sizes that all differ."""
    name, first = next(iter(arguments(node).items()))
    marked = torch.empty([*range(2, 2 + len(shape_of(first)))], device="meta")
    others = node.args[1:]
    size = node.target(marked, *others, **node.kwargs).shape[axis]  # type: ignore[operator]
    return _changed(node, **{name: Block(first, size - 2)})


def _along_dim(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Of operators that work along the axes of their argument `dim`, and keep the entries of others apart."""
    given = arguments(node)
    name, first = next(iter(given.items()))
    rank, dims = len(shape_of(first)), given.get("dim", given.get("dims"))
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    worked = {dim % rank for dim in dims}
    kept = [*range(rank)]
    if len(shape_of(node)) != rank:
        kept = [at for at in kept if at not in worked]
    at = kept[axis]
    return None if at in worked else _changed(node, **{name: Block(first, at)})


def _leading(trailing: Callable[[Mapping[str, Any]], int]) -> Rule:
    """Of operators that mix the last `trailing(arguments)` axes of their first operand, and keep their number."""

    def rule(node: fx.Node, axis: int, count: int) -> BlockCall | None:
        given = arguments(node)
        name, first = next(iter(given.items()))
        rank = len(shape_of(first))
        # A probe holds a row for each example.
        probed = given.get("probe") is not None and axis == 0
        apart = rank == len(shape_of(node)) and axis < rank - trailing(given)
        return _changed(node, **{name: Block(first, axis)}) if apart and not probed else None

    return rule


def _spatial(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Of operators such as conv2d on (examples, channels, two more axes): a rank less has no examples."""
    found = re.search(r"(\d)d$", _name(node))
    given = arguments(node)
    name, first = next(iter(given.items()))
    axes = int(found[1]) + 2 if found else len(shape_of(given["weight"]))
    alone = axis == 0 and len(shape_of(first)) == axes and given.get("probe") is None
    return _changed(node, **{name: Block(first, 0)}) if alone else None


def _examples(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Of operators that keep the entries of the first axis apart: of BatchNorm with the statistics of the run."""
    given = arguments(node)
    apart = axis == 0 and given.get("probe") is None and not given.get("training")
    return _like_first(node, axis, count) if apart else None


def _product(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Of matmul, mm and bmm, and of addmm and baddbmm, which add an operand."""
    given, shape = arguments(node), shape_of(node)
    added = given["self"] if "beta" in given else None
    places = [name for name in given if name in ("mat1", "mat2", "batch1", "batch2", "other")]
    places = places if added is not None else ["self", *places]
    left, right = (shape_of(given[name]) for name in places)
    rank = len(shape)
    if min(len(left), len(right)) < 2:
        return None
    changes: dict[str, Any] = {}
    if axis == rank - 2:
        changes[places[0]] = Block(given[places[0]], len(left) - 2)
    elif axis == rank - 1:
        changes[places[1]] = Block(given[places[1]], len(right) - 1)
    else:
        changes = {name: _aligned(given[name], axis, shape) for name in places}
    if added is not None:
        changes["self"] = _aligned(added, axis, shape)
    return None if None in changes.values() else _changed(node, **changes)


def _attention(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    given, shape = arguments(node), shape_of(node)
    operands = {name: given[name] for name in ("query", "key", "value")}
    alike = all(len(shape_of(one)) == len(shape) for one in operands.values())
    sized = alike and all(same_size(shape_of(o)[axis], shape[axis]) for o in operands.values())
    if not sized or axis >= len(shape) - 2 or given["dropout_p"] != 0.0:
        return None
    changes: dict[str, Any] = {name: Block(one, axis) for name, one in operands.items()}
    if given["attn_mask"] is not None:
        changes["attn_mask"] = _aligned(given["attn_mask"], axis, shape)
    return None if None in changes.values() else _changed(node, **changes)


def _embedding(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    given = arguments(node)
    name = "ids" if "ids" in given else "indices"
    probed = given.get("probe") is not None and axis == 0
    # With `scale_grad_by_freq` gradients are divided by how often an id stands in the batch.
    mixed = probed or bool(given.get("scale_grad_by_freq"))
    apart = axis < len(shape_of(given[name])) and not mixed
    return _changed(node, **{name: Block(given[name], axis)}) if apart else None


def _join(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    """Of cat along another axis, and of stack."""
    given, rank = arguments(node), len(shape_of(node))
    dim = given["dim"] % rank
    at = axis - (axis > dim) if _name(node) == "aten::stack" else axis
    same = all(len(shape_of(one)) > at for one in given["tensors"])  # cat passes over empty vectors
    if axis == dim or not same:
        return None
    return _changed(node, tensors=[Block(one, at) for one in given["tensors"]])


def _expand(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    given, shape = arguments(node), shape_of(node)
    source = _aligned(given["self"], axis, shape)
    size = _shortened(shape, axis, count)
    return None if source is None else _changed(node, self=source, size=size)


def _repeat(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    given = arguments(node)
    repeats = [*given["repeats"]]
    if repeats[axis] == 1:
        source = _aligned(given["self"], axis, shape_of(node))
        return None if source is None else _changed(node, self=source)
    if not isinstance(repeats[axis], int) or repeats[axis] % count:
        return None
    repeats[axis] //= count
    return _changed(node, repeats=repeats)


def _filled(node: fx.Node, axis: int, count: int) -> BlockCall | None:
    return _changed(node, size=_shortened(shape_of(node), axis, count))


def _shortened(shape: Any, axis: int, count: int) -> list[Any]:
    return [size // count if at == axis else size for at, size in enumerate(shape)]


Rule = Callable[[fx.Node, int, int], BlockCall | None]


def _table(kinds: Mapping[str, Rule]) -> dict[str, Rule]:
    return {
        name if "::" in name else f"aten::{name}": rule
        for names, rule in kinds.items()
        for name in names.split()
    }


_SEVERAL = frozenset(
    f"aten::{name}"
    for name in ("chunk", "split", "split_with_sizes", "unbind", "max", "min", "topk", "sort")
)
"""The operators whose results have the same axes."""
_RULES = _table(
    {
        "contiguous clone detach alias to _to_copy type_as lift_fresh relu6 hardswish log_sigmoid": _like_first,
        "hardswish_ ones_like zeros_like full_like": _like_first,
        "dropout dropout_ feature_dropout alpha_dropout": _dropout,
        "masked_fill masked_fill_ where": _pointwise,
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze": _reshape,
        "transpose permute t numpy_T mT movedim moveaxis swapaxes swapdims": _permute,
        "mean sum amax amin prod logsumexp var std linalg_vector_norm norm any all argmax argmin": _along_dim,
        "softmax log_softmax _softmax _log_softmax cumsum cumprod flip roll glu index_select": _along_dim,
        "max min topk sort select slice narrow chunk split split_with_sizes unbind": _along_dim,
        "linear trainc::linear": _leading(lambda given: 1),
        "layer_norm rms_norm trainc::layer_norm trainc::rms_norm": _leading(
            lambda given: len(given["normalized_shape"])
        ),
        "tril triu": _leading(lambda given: 2),
        "pad constant_pad_nd": _leading(lambda given: len(given["pad"]) // 2),
        "conv1d conv2d conv3d max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d": _spatial,
        "conv_transpose1d conv_transpose2d conv_transpose3d avg_pool3d adaptive_avg_pool3d": _spatial,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d": _spatial,
        "upsample_bilinear2d upsample_bicubic2d convolution trainc::convolution": _spatial,
        "group_norm trainc::group_norm prelu batch_norm": _examples,
        "matmul mm bmm addmm baddbmm": _product,
        "scaled_dot_product_attention": _attention,
        "embedding trainc::embedding": _embedding,
        "cat stack": _join,
        "expand": _expand,
        "repeat": _repeat,
        "ones zeros full new_ones new_zeros new_full": _filled,
    }
)
