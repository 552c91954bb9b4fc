"""Differentiate a forward graph: loss, penalties and every gradient as one flat ATen graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from trainc.compiler.graph.forward_graph import ForwardGraph, Run, identifier
from trainc.compiler.method.penalty import Penalty, Values, evaluate

aten = torch.ops.aten
SHARE = "share"

# No-ops under no_grad: they only separate autograd histories, and the step graph has none.
_NO_OPS = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default}


@dataclass(frozen=True, slots=True)
class StepParts:
    """A flat graph with its outputs' names, the scalars it takes, and its constant tensors."""

    graph: fx.Graph
    outputs: tuple[str, ...]
    scalars: tuple[tuple[str, str], ...]
    constants: dict[str, Tensor]


def differentiate(
    forward: ForwardGraph, parameters: Sequence[str], penalties: Mapping[str, Penalty]
) -> StepParts:
    """Trace forward and the gradients of `parameters` (canonical names) and of the probes.

    The scalar `share` multiplies loss and penalties where it is available, so that micro-batches
    add up to the step's mean.
    """
    mode = forward.mode
    scalars = list(forward.available)
    tensor_names = list(forward.tensors)
    inputs = [n.name for n in forward.graph.nodes if n.op == "placeholder"]
    batch = [n for n in inputs if n not in _added(forward)]
    probes = {module: node.name for module, node in forward.probes.items()}
    owners = {id(tensor): name for name, tensor in forward.tensors.items()}
    outputs: list[str] = []

    def step(*flat: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            tensors = dict(zip(tensor_names, flat, strict=False))
            rest = flat[len(tensor_names) :]
            given = dict(zip(batch, rest, strict=False))
            numbers = dict(zip(scalars, rest[len(batch) :], strict=True))
            given |= {node.name: numbers[name] for name, node in forward.scalars.items()}
            for node in forward.probes.values():
                like = node.meta["val"]
                given[node.name] = torch.zeros(
                    like.shape, dtype=like.dtype, device=like.device
                ).requires_grad_()
            results = dict(
                zip(
                    forward.outputs,
                    Run(forward, tensors, given).run(enable_io_processing=False),
                    strict=True,
                )
            )
            loss = results.get("loss", results["task"])
            values = Values(tensors | numbers, forward.canonical)
            total = loss
            for name, penalty in penalties.items():
                total = total + evaluate(name, penalty, values, owners)
            if SHARE in numbers:
                total = total * numbers[SHARE]
            wanted = [tensors[name] for name in parameters] + [
                given[name] for name in probes.values()
            ]
            # Eager training's backward runs outside autocast; the engine would not, here.
            with _no_autocast(total.device.type):
                grads = _gradients(total, wanted)
        named: dict[str, Tensor | None] = {"total": total, "loss": loss, "task": results["task"]}
        if "consistency" in results:
            named["consistency"] = results["consistency"]
        named |= {f"grad:{n}": g for n, g in zip(parameters, grads, strict=False)}
        named |= {f"probe:{n}": g for n, g in zip(probes, grads[len(parameters) :], strict=True)}
        outputs[:] = named
        return [None if value is None else value.detach() for value in named.values()]

    trainable = set(parameters)
    with mode:
        arguments = [
            _leaf(mode, tensor, name in trainable) for name, tensor in forward.tensors.items()
        ]
        arguments += [forward.values[name] for name in batch]
        arguments += [_leaf(mode, forward.available[name], False) for name in scalars]
    with preserve_node_meta():
        traced = make_fx(step, tracing_mode="real", _allow_non_fake_inputs=True)(*arguments)
    torch.clear_autocast_cache()
    return _flatten(traced, forward, tensor_names, batch, scalars, tuple(outputs))


def _added(forward: ForwardGraph) -> set[str]:
    return {node.name for node in (*forward.scalars.values(), *forward.probes.values())}


def _gradients(total: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not wanted or not total.requires_grad:
        return (None,) * len(wanted)
    return torch.autograd.grad(total, wanted, allow_unused=True)


def _leaf(mode: Any, tensor: Tensor, trainable: bool) -> Tensor:
    fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake.requires_grad_(trainable)


@contextlib.contextmanager
def _no_autocast(device: str) -> Any:
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def _flatten(
    traced: fx.GraphModule,
    forward: ForwardGraph,
    tensor_names: Sequence[str],
    batch: Sequence[str],
    scalars: Sequence[str],
    outputs: tuple[str, ...],
) -> StepParts:
    """Rebuild the traced graph with get_attr nodes for tensors and placeholders for the rest."""
    old = list(traced.graph.nodes)
    given = [node for node in old if node.op == "placeholder"]
    attributes = dict(zip(given, tensor_names, strict=False))
    ports = dict(
        zip(given[len(tensor_names) :], [*batch, *(f"scalar_{n}" for n in scalars)], strict=True)
    )
    new, environment = fx.Graph(), {}
    table: list[tuple[str, str]] = []
    for node, name in ports.items():
        made = new.placeholder(identifier(name))
        made.target = made.name
        made.meta = dict(node.meta)
        environment[node] = made
        if len(environment) > len(batch):
            table.append((scalars[len(environment) - len(batch) - 1], made.name))
    constants: dict[str, Tensor] = {}
    for node, name in attributes.items():
        if node.users:
            environment[node] = _attribute(new, node, name)
            if name not in forward.canonical:
                constants[name] = forward.tensors[name]
    for node in old:
        if node in environment or node.op == "placeholder":
            continue
        if node.op == "get_attr":
            tensor = getattr(traced, str(node.target))
            name = f"penalty_constant_{len(constants)}"
            constants[name] = tensor
            environment[node] = _attribute(new, node, name)
        elif node.op == "call_function" and node.target in _NO_OPS:
            environment[node] = environment[node.args[0]]
        elif node.op == "output":
            results = fx.node.map_arg(node.args[0], lambda n: environment[n])
            new.output(tuple(_own(new, results, outputs)))
        else:
            environment[node] = new.node_copy(node, lambda n: environment[n])
    remove_dead(new)
    new.lint()
    read = {node.target for node in new.nodes if node.op == "get_attr"}
    constants = {name: tensor for name, tensor in constants.items() if name in read}
    return StepParts(new, outputs, tuple(table), constants)


def _attribute(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    made = graph.create_node("get_attr", name, name=identifier(name))
    made.meta = {"val": node.meta.get("val")}
    return made


def _own(graph: fx.Graph, results: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    """Give each gradient dense storage of its own, as eager does: callers clip in place."""
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


def remove_dead(graph: fx.Graph) -> bool:
    """Erase calls nobody reads, but none that writes to memory or draws random numbers."""
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
