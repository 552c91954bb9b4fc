"""Give each gradient of a step graph dense memory of its own, as eager training does."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def own_storage(graph: fx.Graph, results: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    """Return the results with a copy of each gradient that shares memory or is not dense: callers clip in place."""
    seen: set[fx.Node] = set()
    owned: list[Any] = []
    for name, node in zip(outputs, results, strict=True):
        if isinstance(node, fx.Node) and name.startswith(("grad:", "probe:")):
            root = _root(node)
            value = node.meta.get("val")
            dense = value is None or _is_dense(value)
            if root in seen or root.op != "call_function" or not dense:
                copied = graph.call_function(
                    aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
                copied.meta = dict(node.meta)
                node = copied
            seen.add(root)
        owned.append(node)
    return owned


def _is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor fills its memory without gaps or overlaps, in any order of its dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _root(node: fx.Node) -> fx.Node:
    """Follow views back to the node that owns the memory."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        target = node.target
        if target is operator.getitem and _is_view(node.args[0].target):
            node = node.args[0]
        elif not _is_view(target):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )
