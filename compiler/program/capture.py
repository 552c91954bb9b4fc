"""Capture: a model, a task and one batch become a step graph, through the forward passes.

The model is exported to ATen, rewritten by the pipeline, and only then differentiated: a fused
operator brings its own backward, so no pass has to find and repair backward nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from trainc.compiler.graph.differentiate import differentiate
from trainc.compiler.graph.export_capture import PREFIX, ROADS, Road, Task, Wrapped
from trainc.compiler.graph.forward_graph import ForwardGraph, LossSpec, identifier, register_tensor
from trainc.compiler.graph.step_graph import Batch, Interface, Port, StepGraph, flatten_inputs
from trainc.compiler.method.penalty import Penalty
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.pass_base import Pass, run_passes
from trainc.compiler.passes.pipeline import PIPELINE, check_names, check_order


class CaptureFailed(RuntimeError):
    """The model could not be captured as one graph; the message says what stopped it."""


def signature(model: nn.Module, batch: Batch) -> Hashable:
    """Return what a captured graph is valid for.

    That is: the batch's shapes, dtypes and devices, autocast, the mode, and what is trained.
    """
    kind, entries = flatten_inputs(batch[0])
    tensors = [*entries, ("targets", batch[1])]
    shapes = tuple((key, tuple(t.shape), t.dtype, str(t.device)) for key, t in tensors)
    devices = sorted({t.device.type for _, t in tensors})
    autocast = tuple(
        (d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)
    )
    trained = tuple(p.requires_grad for p in model.parameters())
    return kind, shapes, autocast, model.training, trained


def capture(
    model: nn.Module,
    task: Task,
    batch: Batch,
    *,
    rewrite: Rewrite,
    penalties: Mapping[str, Penalty],
    scalars: Mapping[str, Tensor],
    without: frozenset[str] = frozenset(),
    passes: Sequence[Pass] = PIPELINE,
    road: Road | None = None,
) -> StepGraph:
    """Capture one training step for batches like `batch`.

    A penalty is called with one mapping that holds the parameters and `scalars` by name; a number
    that changes over time must come from there, since what a penalty closes over is fixed in the
    graph. `scalars` may hold tensors of any shape; `share` multiplies loss and penalties.
    """
    started = time.perf_counter()
    check_names(without, passes)
    check_order(passes)
    make = partial(forward_graph, model, task, views=rewrite.views, scalars=scalars)
    forward, road = _first_road(make, batch, ROADS if road is None else {"the given road": road})
    forward.recapture_with_one_more_example = partial(_enlarged, make, batch, road)
    reports = run_passes(forward, rewrite, passes, without)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        parts = differentiate(forward, trained, penalties)
    except ValueError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CaptureFailed(
            f"the model could not be differentiated as a graph: {reason}"
        ) from error
    kind, entries = flatten_inputs(batch[0])
    names = input_names(batch)
    ports = tuple(Port.of(n, key, t) for n, (key, t) in zip(names, entries, strict=True))
    interface = Interface(
        kind, ports, Port.of("targets", None, batch[1]), parts.scalars, parts.outputs, rewrite.views
    )
    step = StepGraph(model, parts.graph, interface, parts.constants)
    step.reports, step.notes = reports, tuple(forward.notes)
    step.seconds = time.perf_counter() - started
    return step


def _first_road(
    make: Callable[..., ForwardGraph], batch: Batch, roads: Mapping[str, Road]
) -> tuple[ForwardGraph, Road]:
    """Return the forward graph by the first road that can capture it; the others are noted."""
    refused: list[str] = []
    causes: list[Exception] = []
    for name, road in roads.items():
        try:
            forward = make(batch=batch, road=road)
        except Exception as error:
            refused.append(f"{name} could not capture the model: {type(error).__name__}: {error}")
            causes.append(error)
        else:
            forward.notes += [f"{text.splitlines()[0]}; captured by {name}" for text in refused]
            return forward, road
    raise CaptureFailed("\n".join(refused)) from causes[0]


def forward_graph(
    model: nn.Module,
    task: Task,
    batch: Batch,
    views: int,
    scalars: Mapping[str, Tensor],
    road: Road,
) -> ForwardGraph:
    """Capture the forward pass and the task as flat ATen nodes over the user's parameter names."""
    wrapped = Wrapped(model, task, views)
    batch = _distinct(batch)
    module = road(wrapped, batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, tensors = _renamed(module, model, batch)
    holder = fx.GraphModule(module, fx.Graph())
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            holder.add_module(name, child)
    for name, tensor in tensors.items():
        register_tensor(holder, name, tensor)
    holder.graph = graph
    names = [*input_names(batch), "targets"]
    given = [*(t for _, t in flatten_inputs(batch[0])[1]), batch[1]]
    fakes: dict[str, Tensor] = {
        n: mode.from_tensor(t.detach(), static_shapes=True)
        for n, t in zip(names, given, strict=True)
    }
    return ForwardGraph(
        holder,
        tensors,
        canonical_names(model),
        fakes,
        scalars,
        LossSpec.of(task),
        batch[1].shape[0],
        views,
        mode,
    )


def input_names(batch: Batch) -> list[str]:
    """Return the placeholder names of the inputs."""
    taken = {"targets"}
    names = []
    for key, _ in flatten_inputs(batch[0])[1]:
        name = "inputs" if key is None else identifier(f"inputs_{key}")
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map every name of every parameter and buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


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
    module: fx.GraphModule, model: nn.Module, batch: Batch
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy a captured graph with the user's names and plain inputs, without its checks."""
    names = canonical_names(model)
    by_object = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    ports = iter([*input_names(batch), "targets"])
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
            made.target = next(ports)
            made.name = made.target
        elif node.op == "get_attr" and isinstance(
            value := _attribute(module, str(node.target)), Tensor
        ):
            plain = str(node.target).removeprefix(f"{PREFIX}.")
            made.target = by_object.get(id(value)) or names.get(plain) or next(fresh)
            tensors.setdefault(str(made.target), value)
        _plain_stack(made)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph, {**_own_tensors(model), **{n: t for n, t in tensors.items() if n not in names}}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _attribute(module: nn.Module, target: str) -> Any:
    return fx.graph_module._get_attr(module, target)


def _is_check(node: fx.Node) -> bool:
    checks = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg)
    return node.op == "call_module" or (node.op == "call_function" and node.target in checks)


def _plain_stack(node: fx.Node) -> None:
    """Drop the wrapper from the module stack, so that paths are the user's."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        kept = {}
        for key, (path, kind) in stack.items():
            if path == PREFIX or path.startswith(f"{PREFIX}."):
                kept[key] = (path[len(PREFIX) + 1 :], kind)
        node.meta["nn_module_stack"] = kept
    for key in ("val", "tensor_meta", "unbacked_bindings", "from_node"):
        node.meta.pop(key, None)


def _enlarged(make: Callable[..., ForwardGraph], batch: Batch, road: Road) -> ForwardGraph:
    """Capture with one more example in the batch."""
    inputs, targets = _distinct(batch)
    more = pytree.tree_map(lambda t: torch.cat([t, t[:1]]), (inputs, targets))
    forward = make(batch=more, road=road)
    forward.propagate()
    return forward
