"""Remove calls whose results are never read."""

from __future__ import annotations

import operator

import torch
from torch import fx


def remove_dead(graph: fx.Graph) -> bool:
    """Erase calls whose results are never read, unless they write to memory or draw random numbers."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not _has_effect(node):
            graph.erase_node(node)
            changed = True
    return changed


def _has_effect(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function" and target is not operator.getitem
    return (
        target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in target.tags
        or "batch_norm" in target._schema.name
    )
