"""How the weights of layers divide into matrices: fused projections, heads, experts, gates and kernel positions.

What a layer is decides, and where it stands: the numbers of heads are those that its parent has. Names tell what the
outputs of a fused projection are, and in which order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from trainc.compiler.structure.matrices import Division, Layout, Part
from trainc.compiler.structure.roles import is_linear, own_class, own_parameters, type_names

_QUERIES = {
    "q", "q_proj", "query", "query_proj", "wq", "to_q", "q_lin", "linear_q", "q_attn", "q_proj_weight",
}  # fmt: skip
_KEYS = {"k", "k_proj", "key", "key_proj", "wk", "to_k", "k_lin", "linear_k", "k_proj_weight"}
_VALUES = {"v", "v_proj", "value", "value_proj", "wv", "to_v", "v_lin", "linear_v", "v_proj_weight"}
_OUTPUTS = {
    "o", "o_proj", "out_proj", "wo", "to_out", "o_lin", "c_proj", "proj", "dense", "out_lin",
}  # fmt: skip
_FUSED = {
    "c_attn", "qkv", "qkv_proj", "to_qkv", "wqkv", "att_proj", "attn_qkv", "in_proj_weight",
}  # fmt: skip
"""Queries, then keys, then values."""
_BY_GROUP = {"query_key_value"}
"""For each head of keys, its heads of queries, then the keys, then the values."""
_OTHER_ORDER = {"CodeGenAttention", "MiniMaxLightningAttention"}
"""Classes with a fused projection of a usual name in an order of their own."""
UNKNOWN_ORDER = "one matrix: the order of its queries, keys and values is not known"
"""The reason for the division of a fused projection of which this is so."""
_KEYS_VALUES = {"kv", "to_kv", "wkv", "key_value"}
_GATED = {"gate_up_proj"}

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_head_kv",
)  # fmt: skip
_GATES = {"LSTM": "ifgo", "GRU": "rzn"}
"""The gates of recurrent layers, in the order of their outputs."""


def divide(
    leaf: str, shape: Sequence[int], layer: nn.Module, segment: str, parent: nn.Module | None
) -> Division | None:
    """Return how the weight `leaf` of a layer is divided; None for a shape that is no matrix.

    `segment` is the layer's name in its `parent`. The weight is taken to be a matrix, or several.
    """
    if isinstance(layer, nn.modules.conv._ConvNd) or (len(shape) > 2 and _is_convolution(layer)):
        return _convolution(shape, layer)
    if len(shape) == 3:
        return _stack(leaf, shape, layer)
    if len(shape) != 2:
        return None
    if isinstance(layer, nn.RNNBase):
        return _gates(leaf, shape, layer)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return Division("transposed", f"a table of {shape[0]} rows")
    # transformers' Conv1D keeps inputs first.
    layout: Layout = "transposed" if "Conv1D" in type_names(layer) else "linear"
    name, holder = (leaf, layer) if leaf != "weight" or parent is None else (segment, parent)
    outputs, inputs = shape if layout == "linear" else reversed(shape)
    return _projection(layout, name.lower(), outputs, inputs, holder)


def _is_convolution(layer: nn.Module) -> bool:
    return not is_linear(layer) and any(
        re.search(r"conv(transpose)?\d?d", t, re.I) for t in type_names(layer)
    )


def _convolution(shape: Sequence[int], layer: nn.Module) -> Division | None:
    if len(shape) < 3:
        return None
    positions = math.prod(shape[2:])
    groups = int(getattr(layer, "groups", 1))
    why = (
        f"a matrix at each of {positions} kernel positions, together"
        if positions > 1
        else "one kernel position"
    )
    if groups > 1:
        why += f"; {groups} groups"
    turned = bool(getattr(layer, "transposed", False))
    return Division("transposed convolution" if turned else "convolution", why, groups=groups)


def _gates(leaf: str, shape: Sequence[int], layer: nn.Module) -> Division:
    names = _GATES.get(str(getattr(layer, "mode", "")), "")
    if not names or not leaf.startswith(("weight_ih", "weight_hh")):
        return Division("linear", "one matrix")
    return Division("linear", "its gates apart", tuple(_equal(shape[0], tuple(names))))


def _stack(leaf: str, shape: Sequence[int], holder: nn.Module) -> Division:
    """Return the division of a stack of matrices along its first axis, such as those of experts."""
    gated, turned = leaf in _GATED, _has_inputs_first(holder)
    what = (
        "expert"
        if "expert" in own_class(holder).__name__.lower() or hasattr(holder, "num_experts")
        else "matrix"
    )
    parts: list[Part] = []
    for i in range(shape[0]):
        inside = _gate_and_up(shape[2 if turned else 1], holder) if gated else (Part(),)
        parts += [replace(p, name=f"{what} {i} {p.name}".strip(), index=i) for p in inside]
    why = f"{shape[0]} {'experts' if what == 'expert' else 'matrices'}, each apart"
    why += ", gate and up projection apart" if gated else ""
    return Division("transposed stack" if turned else "stack", why, tuple(parts))


def _has_inputs_first(holder: nn.Module) -> bool:
    """Say whether the stacks of a module hold inputs before outputs: it says so, or only then sizes fit."""
    own = own_parameters(holder)
    if hasattr(holder, "is_transposed") or not {"gate_up_proj", "down_proj"} <= own.keys():
        return bool(getattr(holder, "is_transposed", False))
    _, first, second = own["gate_up_proj"].shape
    down = tuple(own["down_proj"].shape[1:])
    return down != (second, first // 2) and down == (second // 2, first)


def _projection(
    layout: Layout, name: str, outputs: int, inputs: int, holder: nn.Module
) -> Division:
    """Return the division of a linear layer in its parent, or of a matrix that the parent holds itself."""
    heads, key_heads = head_counts(holder)
    if name in _FUSED | _BY_GROUP:
        return _fused(layout, name, outputs, holder)
    if name in _KEYS_VALUES and not outputs % 2:
        parts = _equal(outputs, ("k", "v"))
        return Division(layout, "keys and values apart", *_with_heads(parts, (key_heads,) * 2))
    if name in _GATED and not outputs % 2:
        return Division(
            layout, "gate and up projection apart", tuple(_gate_and_up(outputs, holder))
        )
    count = heads if name in _QUERIES | _OUTPUTS else key_heads if name in _KEYS | _VALUES else 0
    axis_size = inputs if name in _OUTPUTS else outputs
    if count > 1 and not axis_size % count and _attends(holder):
        whole = Part("", (range(axis_size),), "inputs" if name in _OUTPUTS else "outputs")
        return Division(layout, "one matrix", heads=tuple(_by_head(whole, count)))
    return Division(layout, "one matrix")


def _attends(holder: nn.Module) -> bool:
    """Say whether a module holds queries beside keys, or both fused."""
    names = {n.lower() for n in (*holder._modules, *own_parameters(holder))}
    return bool(names & (_FUSED | _BY_GROUP | _KEYS_VALUES) or (names & _QUERIES and names & _KEYS))


def _fused(layout: Layout, name: str, outputs: int, holder: nn.Module) -> Division:
    """Return the division of a fused projection into queries, keys and values."""
    unknown = Division(layout, UNKNOWN_ORDER)
    heads, key_heads = head_counts(holder)
    if own_class(holder).__name__ in _OTHER_ORDER:
        return unknown
    beside = {n.lower() for n in holder._modules} & _QUERIES
    if beside and not outputs % 2:
        parts = _equal(outputs, ("k", "v"))
        return Division(layout, "keys and values apart", *_with_heads(parts, (key_heads,) * 2))
    each = outputs // (heads + 2 * key_heads) if heads else 0
    fits = each > 0 and each * (heads + 2 * key_heads) == outputs and not heads % key_heads
    if name in _BY_GROUP or (name == "c_attn" and getattr(holder, "multi_query", True) is False):
        if not fits:
            return unknown
        parts = _interleaved(heads // key_heads, key_heads, each)
    elif fits:
        parts = _consecutive({"q": heads * each, "k": key_heads * each, "v": key_heads * each})
    elif not outputs % 3:
        parts, heads, key_heads = _equal(outputs, ("q", "k", "v")), 0, 0
    else:
        return unknown
    why = "queries, keys and values apart"
    if heads != key_heads:
        why += f"; {heads} heads of queries, {key_heads} of keys and values"
    return Division(layout, why, *_with_heads(parts, (heads, key_heads, key_heads)))


def head_counts(holder: nn.Module) -> tuple[int, int]:
    """Return a module's numbers of attention heads, and of those of keys and values; 0 where it has none."""
    heads = _number(holder, _HEADS)
    if getattr(holder, "multi_query", False):
        return heads, _number(holder, _KEY_HEADS) or 1
    return heads, _number(holder, _KEY_HEADS) or heads


def _number(holder: nn.Module, names: Sequence[str]) -> int:
    places: tuple[Any, ...] = (holder, getattr(holder, "config", None))
    found = (getattr(place, name, None) for place in places for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


def _consecutive(sizes: dict[str, int]) -> list[Part]:
    ends = [0]
    for size in sizes.values():
        ends.append(ends[-1] + size)
    return [Part(n, (range(a, b),)) for n, (a, b) in zip(sizes, pairwise(ends), strict=True)]


def _equal(size: int, names: Sequence[str]) -> list[Part]:
    return _consecutive(dict.fromkeys(names, size // len(names)))


def _gate_and_up(size: int, holder: nn.Module) -> list[Part]:
    """Return the halves of a fused projection, which take turns where the holder says so."""
    if getattr(holder, "is_concatenated", True):
        return _equal(size, ("gate", "up"))
    return [Part("gate", (range(0, size, 2),)), Part("up", (range(1, size, 2),))]


def _interleaved(queries: int, groups: int, each: int) -> list[Part]:
    """Return the parts of groups that each hold some heads of queries, and one of keys and of values."""
    size = (queries + 2) * each
    starts = range(0, groups * size, size)

    def cut(name: str, first: int, last: int) -> Part:
        return Part(name, tuple(range(s + first * each, s + last * each) for s in starts))

    return [
        cut("q", 0, queries),
        cut("k", queries, queries + 1),
        cut("v", queries + 1, queries + 2),
    ]


def _with_heads(
    parts: Sequence[Part], counts: Sequence[int]
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return parts, and the same by head where the numbers of heads are known."""
    if not all(counts) or any(
        sum(map(len, p.ranges)) % n for p, n in zip(parts, counts, strict=True)
    ):
        return tuple(parts), ()
    heads = [h for p, n in zip(parts, counts, strict=True) for h in _by_head(p, n)]
    return tuple(parts), tuple(heads)


def _by_head(part: Part, count: int) -> Iterator[Part]:
    """Yield the heads of a part, which lie one after the other in its ranges."""
    each = sum(map(len, part.ranges)) // count
    cuts = (range(s, s + each) for r in part.ranges for s in range(r.start, r.stop, each))
    for i, cut in enumerate(cuts):
        yield replace(part, name=f"{part.name} head {i}".strip(), ranges=(cut,))
