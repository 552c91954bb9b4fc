"""Multiply by noise where a tensor stands, in a step graph in which nothing reads the tensor afterwards."""

from __future__ import annotations

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import arguments
from trainc.compiler.patterns.shared_memory import families, is_fresh
from trainc.kernels.noise import multiplicative_noise as _noise  # noqa: F401  (registers the operator)

aten = torch.ops.aten
NOISE = torch.ops.trainc.multiplicative_noise.default
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default}


def multiply_in_place(graph: fx.Graph) -> None:
    """Save the memory of each product with noise that tokens share, whose factor is small.

    On a CPU memory that is new costs more than the product. On other devices one kernel draws and multiplies.
    """
    related = families(graph)
    for node in graph.find_nodes(op="call_function", target=NOISE):
        value, given = node.args[0].meta["val"], arguments(node)
        shared = given["share"] == "token" and value.dim() > 2 and value.device.type == "cpu"
        if shared and _is_last_reader(node, sorted(related[node.args[0]])):
            product = _replace(graph, node)
            joined = related[node.args[0]] | related.pop(node) - {node} | {product}
            related |= dict.fromkeys(joined, joined)
            graph.erase_node(node)


def _is_last_reader(node: fx.Node, family: list[fx.Node]) -> bool:
    """Say whether a node is the last to read a family of nodes, which is in memory that is the graph's own."""
    views = all(member.target in VIEWS for member in family[1:])
    read = max(max(member.users) for member in family if member.users)
    return views and is_fresh(family[0]) and read is node


def _replace(graph: fx.Graph, node: fx.Node) -> fx.Node:
    x, *noise = node.args
    assert isinstance(x, fx.Node)
    value = x.meta["val"]
    with graph.inserting_before(node):
        token = x
        for axis in range(1, value.dim() - 1):
            token = graph.call_function(aten.slice.Tensor, (token, axis, 0, 1))
        dtype = torch.promote_types(value.dtype, torch.float32)
        ones = graph.call_function(aten.ones_like.default, (token,), {"dtype": dtype})
        factor = graph.call_function(NOISE, (ones, *noise))
        product = graph.call_function(aten.mul_.Tensor, (x, factor))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    return product
