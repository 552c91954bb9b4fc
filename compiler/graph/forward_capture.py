"""Capture the forward pass of a model and its loss by a front end, as a forward graph over the user's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from trainc.compiler.graph.forward_graph import ForwardGraph, LossSpec
from trainc.compiler.graph.interface import Port, describe_batch
from trainc.compiler.graph.named_tensors import (
    canonical_names,
    first_module_names,
    register_tensor,
)
from trainc.compiler.graph.wrapped_model import (
    PREFIX,
    CaptureFrontEnd,
    LossFunction,
    WrappedModel,
)
from trainc.runtime.data.batch import Batch


def capture_forward(
    model: nn.Module,
    loss: LossFunction,
    batch: Batch,
    views: int,
    scalars: Mapping[str, Tensor],
    front_end: CaptureFrontEnd,
) -> ForwardGraph:
    """Capture the forward pass and the loss as flat ATen nodes over the user's parameter names."""
    batch = _distinct(batch)
    _, ports, given = describe_batch(batch)
    module = front_end(WrappedModel(model, loss, views), batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, tensors = _renamed(module, model, ports)
    holder = fx.GraphModule(module, fx.Graph())
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            holder.add_module(name, child)
    for name, tensor in tensors.items():
        register_tensor(holder, name, tensor)
    holder.graph = graph
    fakes: dict[str, Tensor] = {
        port.name: mode.from_tensor(tensor.detach(), static_shapes=True)
        for port, tensor in zip(ports, given, strict=True)
    }
    return ForwardGraph(
        holder,
        tensors,
        canonical_names(model),
        fakes,
        scalars,
        LossSpec.of(loss),
        batch[1].shape[0],
        views,
        mode,
    )


def one_more_example(batch: Batch) -> Batch:
    """Return a batch with its first example once more at the end."""
    inputs, targets = _distinct(batch)
    return pytree.tree_map(lambda t: torch.cat([t, t[:1]]), (inputs, targets))  # type: ignore[no-any-return]


def _distinct(batch: Batch) -> Batch:
    """Return the batch with contiguous tensors, as `run` passes them, and no tensor twice.

    Strides decide at capture whether a reshape is a view, and tracers take equal inputs for one.
    """
    seen: set[int] = set()

    def once(tensor: Tensor) -> Tensor:
        fresh = tensor.clone() if id(tensor) in seen else tensor.contiguous()
        seen.update((id(tensor), id(fresh)))
        return fresh

    inputs, targets = batch
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    return pytree.tree_map(once, inputs), once(targets)


def _renamed(
    module: fx.GraphModule, model: nn.Module, ports: Iterable[Port]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy a captured graph with the user's names and plain inputs, without its checks."""
    names, modules = canonical_names(model), first_module_names(model)
    own = dict([*model.named_parameters(), *model.named_buffers()])
    by_object = {id(tensor): name for name, tensor in own.items()}
    placeholders = iter(ports)
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    fresh = (f"forward_constant_{i}" for i in count())
    for node in module.graph.nodes:
        if _is_check(node):
            continue
        if node.op == "output":
            results = pytree.tree_leaves(node.args)
            graph.output(tuple(environment[n] for n in results))
            continue
        made = graph.node_copy(node, lambda n: environment[n])
        environment[node] = made
        if node.op == "placeholder":
            made.target = made.name = next(placeholders).name
        elif node.op == "get_attr":
            path = str(node.target)
            value = fx.graph_module._get_attr(module, path)
            if isinstance(value, Tensor):
                plain = path.removeprefix(f"{PREFIX}.")
                made.target = by_object.get(id(value)) or names.get(plain) or next(fresh)
                tensors.setdefault(str(made.target), value)
        _plain_stack(made, modules)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph, own | {n: t for n, t in tensors.items() if n not in names}


def _is_check(node: fx.Node) -> bool:
    checks = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg)
    return node.op == "call_module" or (node.op == "call_function" and node.target in checks)


def _plain_stack(node: fx.Node, first_names: Mapping[str, str]) -> None:
    """Drop the wrapper from the module stack, so that paths are the user's: of each module its first name."""
    if stack := node.meta.get("nn_module_stack"):
        plain: dict[str, tuple[str, Any]] = {}
        for key, (path, module_type) in stack.items():
            if path == PREFIX or path.startswith(f"{PREFIX}."):
                own = path[len(PREFIX) + 1 :]
                first = first_names.get(own, own)
                # Calls by several names are several calls, whatever the front end's keys are.
                plain[key if first == own else f"{key} as {own}"] = first, module_type
        node.meta["nn_module_stack"] = plain
    for key in ("val", "tensor_meta", "unbacked_bindings", "from_node"):
        node.meta.pop(key, None)
