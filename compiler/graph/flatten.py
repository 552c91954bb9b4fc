"""Turn a traced step into a flat graph: attributes for the user's tensors, placeholders for the other inputs.

Each gradient gets dense memory of its own, as in eager training.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import ForwardGraph, remove_dead
from trainc.compiler.graph.named_tensors import identifier

aten = torch.ops.aten

T = TypeVar("T")

# No-ops under no_grad: they only separate autograd histories, and the step graph has none.
_NO_OPS = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default}


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The names of a traced step's inputs, in order: the model's tensors, the batch, the scalars."""

    tensors: tuple[str, ...]
    batch: tuple[str, ...]
    scalars: tuple[str, ...]

    @classmethod
    def of(cls, forward: ForwardGraph) -> StepInputs:
        """Return the inputs that a step over a forward graph takes."""
        added = {node.name for node in (*forward.scalars.values(), *forward.probes.values())}
        given = [n.name for n in forward.graph.nodes if n.op == "placeholder"]
        batch = tuple(name for name in given if name not in added)
        return cls(tuple(forward.tensors), batch, tuple(forward.available))

    def split(self, flat: Sequence[T]) -> tuple[dict[str, T], dict[str, T], dict[str, T]]:
        """Return what is given for the tensors, the batch and the scalars, each by name."""
        first, second = len(self.tensors), len(self.tensors) + len(self.batch)
        return (
            dict(zip(self.tensors, flat[:first], strict=True)),
            dict(zip(self.batch, flat[first:second], strict=True)),
            dict(zip(self.scalars, flat[second:], strict=True)),
        )


@dataclass(frozen=True, slots=True)
class FlatStep:
    """A flat graph, the names of its outputs, its scalars with their placeholders, and its constant tensors."""

    graph: fx.Graph
    outputs: tuple[str, ...]
    scalars: tuple[tuple[str, str], ...]
    constants: dict[str, Tensor]


def flatten(
    traced: fx.GraphModule, forward: ForwardGraph, inputs: StepInputs, outputs: tuple[str, ...]
) -> FlatStep:
    """Rebuild a traced step with get_attr nodes for tensors and placeholders for the other inputs."""
    nodes = list(traced.graph.nodes)
    tensors, batch, scalars = inputs.split([node for node in nodes if node.op == "placeholder"])
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for name, node in batch.items():
        made[node] = _placeholder(graph, node, name)
    for name, node in scalars.items():
        made[node] = _placeholder(graph, node, f"scalar_{name}")
    constants: dict[str, Tensor] = {}
    for name, node in tensors.items():
        if node.users:
            made[node] = _attribute(graph, node, name)
            if name not in forward.canonical:
                constants[name] = forward.tensors[name]
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            name = f"term_constant_{len(constants)}"
            constants[name] = getattr(traced, str(node.target))
            made[node] = _attribute(graph, node, name)
        elif node.op == "call_function" and node.target in _NO_OPS:
            made[node] = made[node.args[0]]
        elif node.op == "output":
            results = fx.node.map_arg(node.args[0], made.__getitem__)
            graph.output(tuple(_own_storage(graph, results, outputs)))
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    remove_dead(graph)
    graph.lint()
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    table = tuple((name, made[node].name) for name, node in scalars.items())
    return FlatStep(graph, outputs, table, {n: t for n, t in constants.items() if n in read})


def _placeholder(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    made = graph.placeholder(identifier(name))
    made.target = made.name
    made.meta = dict(node.meta)
    return made


def _attribute(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    made = graph.create_node("get_attr", name, name=identifier(name))
    made.meta = {"val": node.meta.get("val")}
    return made


def _own_storage(graph: fx.Graph, results: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    """Return the results with a copy of each gradient that shares memory or is not dense: callers clip in place."""
    seen: set[fx.Node] = set()
    owned: list[Any] = []
    for name, node in zip(outputs, results, strict=True):
        if isinstance(node, fx.Node) and name.startswith(("grad:", "probe:")):
            root = _root(node)
            value = node.meta.get("val")
            dense = value is None or aten.is_non_overlapping_and_dense.default(value)
            if root in seen or root.op != "call_function" or not dense:
                copied = graph.call_function(
                    aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
                copied.meta = dict(node.meta)
                node = copied
            seen.add(root)
        owned.append(node)
    return owned


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
