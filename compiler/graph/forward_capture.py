"""Capture the forward pass of a model and its loss by a front end, as a forward graph over the user's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from trainc.compiler.errors import SiteUnfit
from trainc.compiler.graph.export_capture import export_capture, open_shapes, open_values
from trainc.compiler.graph.forward_graph import OUTPUTS, ForwardGraph, LossSpec, module_stack
from trainc.compiler.graph.interface import Port, describe_batch, pack_inputs, pack_targets
from trainc.compiler.graph.listing import Symbols
from trainc.compiler.graph.named_tensors import (
    canonical_names,
    first_module_names,
    identifier,
    register_tensor,
)
from trainc.compiler.graph.sizes import Axes
from trainc.compiler.graph.wrapped_model import (
    PREFIX,
    CaptureFrontEnd,
    HooksInPlace,
    LossFunction,
    WrappedModel,
)
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import CAPTURED
from trainc.runtime.data.batch import Batch


def capture_forward(
    model: nn.Module,
    loss: LossFunction,
    batch: Batch,
    rewrite: Rewrite,
    scalars: Mapping[str, Tensor],
    front_end: CaptureFrontEnd,
    hooks: HooksInPlace | None = None,
    axes: Axes | None = None,
) -> ForwardGraph:
    """Capture the forward pass and the loss as flat ATen nodes over the user's parameter names.

    With `axes` (by the placeholders of the batch and the names of scalars), which only torch.export leaves open, the
    graph is for other sizes along them too. `hooks` stand in the model already, and are captured with it. Raises
    SiteUnfit for one whose layer does not run.
    """
    batch = _distinct(batch, copies=bool(axes))
    structure, ports, given = describe_batch(batch)
    used = (*(hooks.scalars if hooks else ()), *(loss.scalars if isinstance(loss, Losses) else ()))
    numbers = {name: scalars[name].clone() for name in used}
    wrapped = WrappedModel(model, loss, rewrite.views, rewrite.mean_loss, hooks, used)
    arguments = (*batch, *numbers.values())
    if axes:
        shapes = open_shapes(batch, ports, len(numbers), axes)
        module = export_capture(wrapped, arguments, shapes)
    else:
        module = front_end(wrapped, arguments)
    values, sizes, scalars = _fake_values(module, ports, (*given, *numbers.values()), scalars, axes)
    names = _names(ports, numbers)
    graph, tensors = _renamed(module, model, names)
    captured, spec = _captured(hooks) if hooks else (), LossSpec.of(loss)
    _check_calls(graph, hooks.modules if hooks else ())
    inputs = graph.find_nodes(op="placeholder")
    holder = _Interpreted(module, fx.Graph())
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            holder.add_module(name, child)
    for name, tensor in tensors.items():
        register_tensor(holder, name, tensor)
    holder.graph = graph
    return ForwardGraph(
        holder,
        tensors,
        canonical_names(model),
        dict(zip(names, values, strict=True)),
        scalars,
        spec,
        values[len(ports) - 1].shape[0],
        rewrite.views,
        values[0].fake_mode,  # type: ignore[attr-defined]
        partial(pack_inputs, structure, ports),
        partial(pack_targets, ports),
        outputs=(*OUTPUTS, *spec.others, *captured),
        scalars=dict(zip(numbers, inputs[len(ports) :], strict=True)),
        sizes=sizes,
    )


class _Interpreted(fx.GraphModule):
    """A graph with its modules that is interpreted node by node, and for which no Python is ever written."""

    def recompile(self) -> Any:
        """Do nothing."""


def _fake_values(
    module: fx.GraphModule,
    ports: Sequence[Port],
    given: Sequence[Tensor],
    scalars: Mapping[str, Tensor],
    axes: Axes | None,
) -> tuple[list[Tensor], Symbols, Mapping[str, Tensor]]:
    """Return the inputs' values, the names of their symbols, and the scalars: fake where they have such sizes."""
    if not axes:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return [mode.from_tensor(t.detach(), static_shapes=True) for t in given], {}, scalars
    values, sizes = open_values(module, ports, axes)
    by_name = {
        name: values[place].shape[axis]
        for place, port in enumerate(ports)
        for axis, name in axes.get(port.name, {}).items()
    }
    changed = dict(scalars)
    for scalar in axes.keys() & scalars.keys():
        tensor, open_axes = scalars[scalar], axes[scalar]
        shape = [
            by_name[open_axes[axis]] if axis in open_axes else size
            for axis, size in enumerate(tensor.shape)
        ]
        with values[0].fake_mode:  # type: ignore[attr-defined]
            changed[scalar] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return values, sizes, changed


def one_more_example(batch: Batch) -> Batch:
    """Return a batch with its first example once more at the end."""
    inputs, targets = _distinct(batch)
    return pytree.tree_map(lambda t: torch.cat([t, t[:1]]), (inputs, targets))  # type: ignore[no-any-return]


def _distinct(batch: Batch, copies: bool = False) -> Batch:
    """Return the batch with contiguous tensors, as `run` passes them, and no tensor twice.

    Strides decide at capture whether a reshape is a view, and tracers take equal inputs for one. With `copies` no
    tensor is the batch's own: torch.export marks those whose sizes stay open, for every later capture.
    """
    seen: set[int] = set()

    def once(tensor: Tensor) -> Tensor:
        if copies or id(tensor) in seen:
            fresh = tensor.clone(memory_format=torch.contiguous_format)
        else:
            fresh = tensor.contiguous()
        seen.update((id(tensor), id(fresh)))
        return fresh

    inputs, targets = batch
    inputs, targets = (dict(t) if isinstance(t, Mapping) else t for t in (inputs, targets))
    return pytree.tree_map(once, inputs), pytree.tree_map(once, targets)


def _names(ports: Iterable[Port], scalars: Iterable[str]) -> list[str]:
    """Return the names of a captured graph's inputs: of the batch, then of the scalars."""
    names = [port.name for port in ports]
    for scalar in scalars:
        name = identifier(f"scalar_{scalar}")
        while name in names:
            name += "_"
        names.append(name)
    return names


def _captured(hooks: HooksInPlace) -> list[str]:
    """Return the names of the captured results, in order; raises SiteUnfit for a layer that did not run."""
    for module, calls in hooks.calls.items():
        if not calls:
            raise SiteUnfit(
                module,
                "the layer did not run in the captured forward pass, but a clause reads its result",
            )
    return [
        f"{CAPTURED}{module}:{i}" for module, calls in hooks.calls.items() for i in range(calls)
    ]


def _check_calls(graph: fx.Graph, modules: Iterable[str]) -> None:
    """Raise SiteUnfit for the first of the modules that no node of the graph comes from."""
    called = {path for node in graph.nodes for path in module_stack(node).values()}
    for module in modules:
        if module not in called:
            raise SiteUnfit(
                module,
                "the layer did not run in the captured forward pass, but a clause changes what it does. A module whose"
                " weight is used directly by its parent, as in nn.MultiheadAttention, is never called: exclude it from"
                " `on`",
            )


def _renamed(
    module: fx.GraphModule, model: nn.Module, inputs: Iterable[str]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy a captured graph with the user's names and `inputs` in place of the front end's, without its checks."""
    names, modules = canonical_names(model), first_module_names(model)
    own = dict([*model.named_parameters(), *model.named_buffers()])
    by_object = {id(tensor): name for name, tensor in own.items()}
    placeholders = iter(inputs)
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
            made.target = made.name = next(placeholders)
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
