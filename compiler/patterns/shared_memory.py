"""Which nodes of a graph may be in the same memory, and which operators write to it."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from trainc.compiler.graph.forward_graph import arguments
from trainc.compiler.patterns.operator_axes import shape_of


def families(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Return for each node those that may share memory with it, itself among them."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = {node}
        for source in shared_operands(node):
            joined = found[node] | found[source]
            found |= dict.fromkeys(joined, joined)
    return found


def shared_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands with which a result may share memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [] if node.op == "output" else node.all_input_nodes
    # The schema of `_unsafe_view` promises that nobody looks at its operand again.
    hidden = node.target is torch.ops.aten._unsafe_view.default
    if hidden or torch.Tag.maybe_aliasing_or_mutating in node.target.tags:
        return node.all_input_nodes
    given = arguments(node)
    shared = [given[a.name] for a in node.target._schema.arguments if a.alias_info is not None]
    return [one for one in pytree.tree_leaves(shared) if isinstance(one, fx.Node)]


def is_fresh(node: fx.Node) -> bool:
    """Say whether an operator makes its result in new memory."""
    return isinstance(node.target, torch._ops.OpOverload) and not shared_operands(node)


def writes(node: fx.Node) -> bool:
    """Say whether a call may write to its operands; of what is no operator nothing is known."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.target is not operator.getitem and shape_of(node) is not None
