"""The forward graph that passes rewrite: the user's model and loss as flat ATen nodes.

Passes work here, before differentiation, because the gradient of a fused operator is then its own
registered backward: on a whole-step graph every rewrite would have to find and replace the matching
backward nodes as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from trainc.compiler.graph.named_tensors import identifier
from trainc.compiler.graph.sizes import SIZE_FUNCTIONS, same_size
from trainc.compiler.method.losses import Losses
from trainc.runtime.data.batch import one_of

aten = torch.ops.aten

OUTPUTS = ("data_loss", "logits")
"""The outputs of a captured forward pass; `data_loss` is the loss without the terms that clauses add."""

CAST = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
_SIZE_ARITHMETIC: dict[str, Any] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}
_WITHOUT_EFFECT = {operator.getitem, *SIZE_FUNCTIONS.values()}
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
    """What the passes may know about the loss: what it is, and the numbers that a fused loss needs."""

    name: str = "loss"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    is_cross_entropy: bool = False
    losses: Losses | None = None
    """All losses, where they are of clauses; the rest is of the first."""

    @classmethod
    def of(cls, loss: object) -> LossSpec:
        """Read the attributes that a loss function carries."""
        plain, losses = cls(), loss if isinstance(loss, Losses) else None
        loss = loss if losses is None else losses.first
        return cls(
            str(getattr(loss, "name", plain.name)),
            int(getattr(loss, "ignore_index", plain.ignore_index)),
            float(getattr(loss, "label_smoothing", plain.label_smoothing)),
            bool(getattr(loss, "is_cross_entropy", plain.is_cross_entropy)),
            losses,
        )

    def is_cross_entropy_of(self, logits: Tensor, targets: Tensor) -> bool:
        """Say whether of these it is the cross-entropy of class indices along the logits' last axis."""
        if self.losses is None:
            return self.is_cross_entropy
        return self.losses.first.is_cross_entropy_of(logits, targets)

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the outputs of a forward graph with the losses besides the first."""
        return () if self.losses is None else tuple(p.scalar for p in self.losses.parts[1:])


@dataclass(slots=True)
class ForwardGraph:
    """The graph, the tensors that its get_attr nodes name, its inputs and its outputs.

    `canonical` maps every name of a tensor to its first name. `values` holds the fake values of the
    placeholders, `available` the 0-d inputs that `scalar` may add. `outputs` names the output
    node's values; `scalars` and `probes` map a name to its placeholder. `examples` is the batch
    size, before it is repeated for `views`: a number, or a symbol where the graph is for many batch sizes.
    `sizes` are the names of the symbols in such a graph. `mode` is the FakeTensorMode of all values.
    `pack_inputs` and `pack_targets` pack the placeholders' values as the batch had its inputs and its targets.
    `recapture_with_one_more_example` captures the model again with one example more: that tells
    the example axis from another axis of the same size.
    """

    module: fx.GraphModule
    tensors: dict[str, Tensor]
    canonical: Mapping[str, str]
    values: dict[str, Tensor]
    available: Mapping[str, Tensor]
    loss: LossSpec
    examples: Any
    views: int
    mode: Any
    pack_inputs: Callable[[Mapping[str, Tensor]], Any]
    pack_targets: Callable[[Mapping[str, Tensor]], Any] = itemgetter("targets")
    recapture_with_one_more_example: Callable[[], ForwardGraph] | None = None
    outputs: tuple[str, ...] = OUTPUTS
    scalars: dict[str, fx.Node] = field(default_factory=dict)
    probes: dict[str, fx.Node] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Notes that a run shows, because the step is not what its spec says."""
    sizes: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """Return the graph under rewriting."""
        return self.module.graph

    @property
    def first_targets(self) -> Tensor:
        """Return the fake value of the targets of the first loss."""
        targets, losses = self.pack_targets(self.values), self.loss.losses
        return one_of(targets if losses is None else losses.parts[0].targets(targets))

    @property
    def rows(self) -> Any:
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
        with self.mode:
            zeros = torch.zeros(self.examples, columns, dtype=dtype, device=result.device)
        self.probes[module] = self._placeholder(f"probe_{module}", zeros)
        return self.probes[module]

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(identifier(name))
        node.target = node.name
        self.values[node.name] = self.fake(value)
        node.meta["val"] = self.values[node.name]
        return node

    def fake(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a value of the graph, its sizes as numbers; one that is a value already stays."""
        if is_fake(tensor):
            return tensor
        fake: Tensor = self.mode.from_tensor(tensor.detach(), static_shapes=True)
        return fake

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        """Add an operator call at the insertion point, as part of the module `like` is in.

        Symbols of sizes among the arguments become nodes that compute them.
        """
        args = pytree.tree_map_only(torch.SymInt, lambda size: self.size(size.node.expr), args)
        node = self.graph.call_function(target, args)
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
        values = fx.node.map_aggregate(
            args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a
        )
        with torch.no_grad(), self.mode:
            node.meta["val"] = target(*values)
        return node

    def size(self, expression: Any) -> Any:
        """Return the number, or a node that computes it, of an expression over the symbols of sizes."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            name, axis = next(
                (name, axis)
                for name, value in self.values.items()
                for axis, size in enumerate(value.shape)
                if same_size(size, expression)
            )
            (node,) = self.graph.find_nodes(op="placeholder", target=name)
            return self._size_call(aten.sym_size.int, node, axis)
        function = _SIZE_ARITHMETIC[expression.func.__name__]
        operands = [self.size(operand) for operand in expression.args]
        return reduce(partial(self._size_call, function), operands)

    def _size_call(self, function: Any, *operands: Any) -> Any:
        node = self.graph.call_function(function, operands)
        node.meta["val"] = function(
            *(o.meta["val"] if isinstance(o, fx.Node) else o for o in operands)
        )
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


def remove_dead(graph: fx.Graph) -> bool:
    """Erase calls whose results are never read, unless they write to memory or draw random numbers."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not _has_effect(node):
            graph.erase_node(node)
            changed = True
    return changed


def _has_effect(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function" and target not in _WITHOUT_EFFECT
    return (
        target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in target.tags
        or "batch_norm" in target._schema.name
    )
