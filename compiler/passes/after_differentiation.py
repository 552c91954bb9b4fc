"""Rewrites of a step graph, which is differentiated already: every bit stays, and memory or launches are saved.

Noise is multiplied where a tensor stands that nothing reads afterwards; a norm's backward adds the gradients that reach
its result by several ways.
"""

from __future__ import annotations

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import arguments
from trainc.compiler.graph.sizes import same_shape
from trainc.compiler.patterns.shared_memory import families, is_fresh, writes
from trainc.kernels.noise import multiplicative_noise as _noise  # noqa: F401  (registers the operator)
from trainc.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from trainc.kernels.norm.norm_operator import NormOperator

aten = torch.ops.aten
NOISE = torch.ops.trainc.multiplicative_noise.default
NORMS: dict[object, NormOperator] = {
    one.OPERATOR.backward_op: one.OPERATOR
    for one in (layer_norm, rms_norm, add_layer_norm, add_rms_norm)
}
"""Norms by the operators of their backward passes."""
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


def add_in_norms(graph: fx.Graph, always: bool = False) -> None:
    """Have the backward of each norm add two or three gradients of its result, as queries, keys and values send them.

    On CUDA that saves a kernel for each sum, and writing and reading what it makes. On a CPU the operator makes the
    sums that it replaces, so there the graph stays as it is, unless `always` is set. No bit changes on either.
    """
    for node in [one for one in graph.nodes if one.target in NORMS]:
        operator, place = NORMS[node.target], int(NORMS[node.target].residual)
        dy = node.args[place]
        if not (isinstance(dy, fx.Node) and (always or dy.meta["val"].device.type == "cuda")):
            continue
        parts, sums = _summands(dy)
        before, after = node.args[:place], node.args[place + 1 :]
        # One gradient may reach both the sum that was normalised and its norm.
        if not sums or dy in (*before, *after) or _written_between(sums[-1], node):
            continue
        third = parts[2] if len(parts) > 2 else None
        with graph.inserting_before(node):
            several = graph.call_function(
                operator.backward_of_sum_op, (*before, *parts[:2], third, *after)
            )
        several.meta = dict(node.meta)
        node.replace_all_uses_with(several)
        for unused in (node, *sums):
            graph.erase_node(unused)


def _summands(dy: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return two or three summands of a tensor, in the order in which they are added, and the sums, the last one first.

    There are none where another node reads a sum too, and where sums are of other shapes or dtypes than their result.
    """
    if not _is_sum(dy):
        return [dy], []
    left, right = dy.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    # a + (b + c) is (b + c) + a, to the bit.
    for inner, other in ((left, right), (right, left)):
        if _is_sum(inner):
            return [*inner.all_input_nodes, other], [dy, inner]
    return [left, right], [dy]


def _is_sum(node: fx.Node) -> bool:
    """Say whether a node is the sum of two tensors like itself, which one node reads."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.users) != 1:
        return False
    if len(node.args) != 2 or len(node.all_input_nodes) != 2:
        return False
    value = node.meta["val"]
    alike = [one.meta["val"] for one in node.all_input_nodes]
    return all(same_shape(one.shape, value.shape) and one.dtype == value.dtype for one in alike)


def _written_between(first: fx.Node, last: fx.Node) -> bool:
    """Say whether a node behind `first` and before `last` writes to memory: the summands are read later than before."""
    node = first.next
    while node is not last:
        if writes(node):
            return True
        node = node.next
    return False
