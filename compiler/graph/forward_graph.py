"""The forward graph that passes rewrite: the user's model and loss as flat ATen nodes.

Passes work here, before differentiation, because the gradient of a fused operator is then its own
registered backward: on a whole-step graph every rewrite would have to find and replace the matching
backward nodes as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from trainc.compiler.graph.named_tensors import identifier

aten = torch.ops.aten

OUTPUTS = ("data_loss", "logits")
"""The outputs of a captured forward pass; `data_loss` is the loss without consistency and penalties."""

CAST = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
_SAME_TENSOR = {aten.alias.default, aten.detach.default, aten.view_as.default}


def strip_casts(node: Any) -> Any:
    """Follow casts back to the value that was cast."""
    while isinstance(node, fx.Node) and node.target in CAST:
        node = node.args[0]
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator call by the names of the operator's schema, with its defaults."""
    target = cast(torch._ops.OpOverload, node.target)
    names = {argument.name: argument.default_value for argument in target._schema.arguments}
    return names | dict(zip(names, node.args, strict=False)) | node.kwargs


@dataclass(frozen=True, slots=True)
class LossSpec:
    """What the passes may know about the loss: its name and the numbers that a fused loss needs."""

    name: str = "loss"
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, loss: object) -> LossSpec:
        """Read the attributes that a loss function carries."""
        plain = cls()
        return cls(
            str(getattr(loss, "name", plain.name)),
            int(getattr(loss, "ignore_index", plain.ignore_index)),
            float(getattr(loss, "label_smoothing", plain.label_smoothing)),
        )


@dataclass(slots=True)
class ForwardGraph:
    """The graph, the tensors that its get_attr nodes name, its inputs and its outputs.

    `canonical` maps every name of a tensor to its first name. `values` holds the fake values of the
    placeholders, `available` the 0-d inputs that `scalar` may add. `outputs` names the output
    node's values; `scalars` and `probes` map a name to its placeholder. `examples` is the batch
    size, before it is repeated for `views`. `mode` is the FakeTensorMode of all values.
    `recapture_with_one_more_example` captures the model again with one example more: that tells
    the example axis from another axis of the same size.
    """

    module: fx.GraphModule
    tensors: dict[str, Tensor]
    canonical: Mapping[str, str]
    values: dict[str, Tensor]
    available: Mapping[str, Tensor]
    loss: LossSpec
    examples: int
    views: int
    mode: Any
    recapture_with_one_more_example: Callable[[], ForwardGraph] | None = None
    outputs: tuple[str, ...] = OUTPUTS
    scalars: dict[str, fx.Node] = field(default_factory=dict)
    probes: dict[str, fx.Node] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """Return the graph under rewriting."""
        return self.module.graph

    @property
    def rows(self) -> int:
        """Return the leading size of a tensor that holds every view of every example."""
        return self.examples * self.views

    @property
    def output(self) -> fx.Node:
        """Return the output node."""
        return self.graph.output_node()

    def result(self, name: str) -> fx.Node:
        """Return the node that computes a named output."""
        node = self.output.args[0][self.outputs.index(name)]  # type: ignore[index]
        assert isinstance(node, fx.Node)
        return node

    def set_results(self, results: Mapping[str, fx.Node]) -> None:
        """Replace the outputs."""
        self.outputs = tuple(results)
        self.output.args = (tuple(results.values()),)

    def tensor_name(self, node: object) -> str | None:
        """Return the user's name of the parameter or buffer that a node reads, before any cast."""
        node = strip_casts(node)
        while isinstance(node, fx.Node) and node.target in _SAME_TENSOR:
            node = node.args[0]
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return str(node.target)
        return None

    def canonical_name(self, name: str) -> str:
        """Return the first name of a parameter or buffer, by any of its names."""
        return self.canonical.get(name, name)

    def weight_uses(self, name: str) -> int:
        """Count the operators that read a parameter, casts left out."""
        first = self.canonical_name(name)
        pending = self.graph.find_nodes(op="get_attr", target=first)
        uses = 0
        while pending:
            for user in pending.pop().users:
                if user.target in CAST:
                    pending.append(user)
                else:
                    uses += 1
        return uses

    def scalar(self, name: str) -> fx.Node:
        """Return the placeholder of a 0-d input, adding it on first use."""
        if name not in self.scalars:
            if name not in self.available:
                raise KeyError(f"the forward graph needs the scalar `{name}`, which was not given")
            self.scalars[name] = self._placeholder(f"scalar_{name}", self.available[name])
        return self.scalars[name]

    def probe(self, module: str, columns: int, result: Tensor) -> fx.Node:
        """Add a module's probe (examples, columns): an input of zeros whose gradient is the measurement.

        It is float32, float64 where the `result` of the module is.
        """
        dtype = torch.float64 if result.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(self.examples, columns, dtype=dtype, device=result.device)
        self.probes[module] = self._placeholder(f"probe_{module}", zeros)
        return self.probes[module]

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(identifier(name))
        node.target = node.name
        self.values[node.name] = self.mode.from_tensor(value, static_shapes=True)
        node.meta["val"] = self.values[node.name]
        return node

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        """Add an operator call at the insertion point, as part of the module `like` is in."""
        node = self.graph.call_function(target, args)
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
        values = fx.node.map_aggregate(
            args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a
        )
        with torch.no_grad(), self.mode:
            node.meta["val"] = target(*values)
        return node

    def results_of(
        self, target: Any, args: tuple[Any, ...], like: fx.Node, count: int = 1
    ) -> list[fx.Node]:
        """Add a call of an operator with several results at the insertion point, and return the first `count`."""
        node = self.call(target, args, like)
        return [self.call(operator.getitem, (node, i), like) for i in range(count)]

    def propagate(self) -> None:
        """Compute every node's value under fake tensors into `meta["val"]`."""
        with torch.no_grad(), self.mode:
            fakes = {
                name: self.mode.from_tensor(tensor, static_shapes=True)
                for name, tensor in self.tensors.items()
            }
            _Propagate(self, fakes, self.values).run()

    def calls(self) -> Iterator[fx.Node]:
        """Iterate over a copy of the list of operator calls, so that a pass may add and erase some."""
        return iter([node for node in self.graph.nodes if node.op == "call_function"])


class ForwardInterpreter(fx.Interpreter):
    """Executes a forward graph with given tensors for its get_attr and placeholder nodes."""

    def __init__(
        self, forward: ForwardGraph, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        super().__init__(forward.module)
        self.tensors = tensors
        self.given = values

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the value given for an input."""
        return self.given[str(target)]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the tensor given for an attribute; nested graphs come from the module."""
        found = self.tensors.get(target)
        return super().get_attr(target, args, kwargs) if found is None else found


class _Propagate(ForwardInterpreter):
    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep what it gave."""
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value


def module_stack(node: fx.Node) -> dict[str, str]:
    """Return the modules around a node, outermost first: a key for the call, and the name."""
    return {key: path for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()}


def call_site(node: fx.Node) -> str:
    """Return the innermost module of a node; "" is the model itself."""
    return next(reversed(module_stack(node).values()), "")
