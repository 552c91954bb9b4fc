"""Capture: a model, a task and one batch become a step graph, through the forward passes.

The model is exported to ATen, rewritten by the pipeline, and only then differentiated: a fused operator brings its own
backward, so no pass has to find and repair backward nodes.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from trainc.compiler.differentiate import Penalty, differentiate
from trainc.compiler.passes.base import Pass, PassReport, run_passes
from trainc.compiler.passes.forward import ForwardGraph, TaskForm, identifier, plant
from trainc.compiler.passes.pipeline import PIPELINE, check_names, check_order
from trainc.compiler.rewrite import Rewrite
from trainc.compiler.step_graph import Batch, Inputs, Interface, Port, StepGraph, flatten_inputs

Task = Callable[[Tensor, Tensor], Tensor]
Road = Callable[["Wrapped", Batch], fx.GraphModule]
_PREFIX = "user"


class CaptureFailed(RuntimeError):
    """The model could not be captured as one graph; the message says what stopped it."""


class Wrapped(nn.Module):
    """The model on every view of the inputs, and the task on the first view."""

    def __init__(self, model: nn.Module, task: Task, views: int) -> None:
        super().__init__()
        self.user = model
        self.task = task
        self.views = views
        self.training = model.training

    def forward(self, inputs: Inputs, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the task's loss on view one and the logits of every view."""
        if self.views > 1:
            inputs = pytree.tree_map(lambda x: torch.cat([x] * self.views), inputs)
        logits = logits_of(call(self.user, inputs))
        first = logits if self.views == 1 else logits[: logits.shape[0] // self.views]
        return self.task(first, targets), logits


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model as the model contract says: a tuple is positional, a dict keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: itself, its `.logits`, or its first entry."""
    found = getattr(output, "logits", output)
    if isinstance(found, Sequence):
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"the model gave a {type(output).__name__} without logits")
    return found


def signature(model: nn.Module, batch: Batch) -> Hashable:
    """Return what a captured graph is valid for: batch shapes, dtypes, devices, autocast, mode, what is trained."""
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

    A penalty is called with one mapping that holds the parameters and `scalars` by name; a number that changes over
    time must come from there, since what a penalty closes over is fixed in the graph. `scalars` may hold tensors of any
    shape; `share` multiplies loss and penalties.
    """
    started = time.perf_counter()
    check_names(without, passes)
    check_order(passes)
    forward = forward_graph(model, task, batch, rewrite.views, scalars, road or export_road)
    forward.enlarged = partial(_enlarged, model, task, batch, rewrite.views, scalars, road or export_road)
    reports = run_passes(forward, rewrite, passes, without)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = differentiate(forward, trained, penalties)
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


def forward_graph(
    model: nn.Module, task: Task, batch: Batch, views: int, scalars: Mapping[str, Tensor], road: Road
) -> ForwardGraph:
    """Capture the forward pass and the task as flat ATen nodes over the user's parameter names."""
    wrapped = Wrapped(model, task, views)
    module = road(wrapped, batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, tensors = _renamed(module, model, batch)
    holder = fx.GraphModule(module, fx.Graph())
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            holder.add_module(name, child)
    for name, tensor in tensors.items():
        plant(holder, name, tensor)
    holder.graph = graph
    names = [*input_names(batch), "targets"]
    given = [*(t for _, t in flatten_inputs(batch[0])[1]), batch[1]]
    fakes = {n: mode.from_tensor(t.detach(), static_shapes=True) for n, t in zip(names, given, strict=True)}
    return ForwardGraph(
        holder, tensors, canonical_names(model), fakes, scalars, TaskForm.of(task), batch[1].shape[0], views, mode
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


def export_road(wrapped: Wrapped, batch: Batch) -> fx.GraphModule:
    """Capture with torch.export, non-strict: it keeps names and parameter objects on every model tried."""
    try:
        with _quietly():
            program = torch.export.export(wrapped, _distinct(batch), strict=False)
            return _unlifted(program)
    except Exception as error:
        raise CaptureFailed(f"torch.export could not capture the model: {type(error).__name__}: {error}") from error


def _unlifted(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return the module of an exported program; `check_guards` came with a later torch."""
    known = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in known else program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _distinct(batch: Batch) -> Batch:
    """Copy a tensor that occurs twice: tracers would take one input for the other."""
    seen: set[int] = set()

    def once(tensor: Tensor) -> Tensor:
        fresh = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
        return fresh

    inputs, targets = batch
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    return pytree.tree_map(once, inputs), once(targets)


def _renamed(module: fx.GraphModule, model: nn.Module, batch: Batch) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy a captured graph with the user's names, plain inputs, and without checks of its inputs."""
    names = canonical_names(model)
    by_object = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    ports = iter([*input_names(batch), "targets"])
    graph, environment = fx.Graph(), {}
    tensors: dict[str, Tensor] = {}
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
        elif node.op == "get_attr" and isinstance(value := _attribute(module, str(node.target)), Tensor):
            plain = str(node.target).removeprefix(f"{_PREFIX}.")
            made.target = by_object.get(id(value)) or names.get(plain) or f"constant_{len(tensors)}"
            tensors.setdefault(str(made.target), value)
        _plain_stack(made)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph, {**_own_tensors(model), **{n: t for n, t in tensors.items() if n not in names}}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in [*model.named_parameters(), *model.named_buffers()]}


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
            if path == _PREFIX or path.startswith(f"{_PREFIX}."):
                kept[key] = (path[len(_PREFIX) + 1 :], kind)
        node.meta["nn_module_stack"] = kept
    for key in ("val", "tensor_meta", "unbacked_bindings", "from_node"):
        node.meta.pop(key, None)


def _enlarged(
    model: nn.Module, task: Task, batch: Batch, views: int, scalars: Mapping[str, Tensor], road: Road
) -> ForwardGraph:
    """Capture with one more example in the batch."""
    more = pytree.tree_map(lambda t: torch.cat([t, t[:1]]), (_plain_inputs(batch[0]), batch[1]))
    forward = forward_graph(model, task, more, views, scalars, road)
    forward.propagate()
    return forward


def _plain_inputs(inputs: Inputs) -> Inputs:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's notices about its own internals from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = ["CaptureFailed", "PassReport", "StepGraph", "capture", "signature"]
