"""Run what all views of an example have in common once, and repeat the batch where they part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.utils import _pytree as pytree

from trainc.compiler.graph.forward_graph import ForwardGraph, arguments, call_site
from trainc.compiler.graph.sizes import same_size
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.pass_base import LOSS, Pass
from trainc.compiler.patterns.operator_axes import Block, BlockCall, block_call, divides, shape_of
from trainc.compiler.patterns.shared_memory import families, is_fresh, shared_operands, writes

aten = torch.ops.aten


class PairLate(Pass):
    """Computes what no random number of a single view reaches for one view, and repeats it for the others.

    The batch is captured with all views of every example. A result that holds the same for each view is computed
    from operands of one view instead, where `operator_axes` knows that this is enough; whoever needs it of all views
    reads it repeated. What is not known to be equal stays as it was captured.
    """

    name = "pair_late"
    purpose = "run once what the views of an example have in common"
    after = ("instrument_norms", "instrument_layers", "share_dropout", "add_noise")

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the loss where every example passes several times."""
        return (LOSS,) if rewrite.views > 1 else ()

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite the part of the graph that all views have in common."""
        common = _Common(forward)
        common.find()
        if common.calls:
            count, before = len(common.calls), len(list(forward.calls()))
            parted = common.rewrite()
            forward.notes.append(
                f"{count} of {before} operators run once for all {forward.views} views"
                + (f", which part at {_named(parted)}" if parted else "")
            )
        return [LOSS]


def _named(modules: list[str]) -> str:
    names = [f"`{name}`" if name else "the model itself" for name in modules]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more places" if names[3:] else "")


@dataclass(slots=True)
class _Common:
    """The nodes whose result is the same for each view.

    `calls` has, for each, the axis along which it holds all views, and the call that gives one.
    `sources` are captured repetitions of one node, the inputs of the model first, with that node.
    """

    forward: ForwardGraph
    calls: dict[fx.Node, tuple[int, BlockCall]] = field(default_factory=dict)
    sources: dict[fx.Node, tuple[int, fx.Node]] = field(default_factory=dict)
    changed: set[fx.Node] = field(default_factory=set)
    """Nodes in memory that an operator writes to, where the order of reading matters."""

    def find(self) -> None:
        """Fill `calls` and `sources`, in the order of the graph."""
        self.changed = _written(self.forward.graph)
        reached: set[fx.Node] = set()
        for node in self.forward.calls():
            if source := self._repeated(node):
                self.sources[node] = source
                reached.add(node)
            elif reached & {*node.all_input_nodes}:
                reached.add(node)
                self._enter(node, reached)

    def _repeated(self, node: fx.Node) -> tuple[int, fx.Node] | None:
        """Return the axis and the node that a call repeats for the views."""
        if node.target is not aten.cat.default or node in self.changed:
            return None
        given = arguments(node)
        tensors = [*given["tensors"]]
        if len(tensors) != self.forward.views or len({*tensors}) != 1:
            return None
        return given["dim"] % len(shape_of(node)), tensors[0]

    def _enter(self, node: fx.Node, reached: set[fx.Node]) -> None:
        """Enter a node that reads a view, if it is the same for each, with all that it needs."""
        shape = shape_of(node)
        for axis in range(0 if shape is None else len(shape)):
            if not divides(shape[axis], self.forward.views):
                continue
            found: dict[fx.Node, tuple[int, BlockCall]] = {}
            call = self._call(node, axis, reached, found, first=True)
            # Of other axes every operand may be used as it is: then they are none of the views.
            if call is not None and any(block.node in reached for block in call.blocks):
                self.calls |= found
                return

    def _call(
        self,
        node: fx.Node,
        axis: int,
        reached: set[fx.Node],
        found: dict[fx.Node, tuple[int, BlockCall]],
        *,
        first: bool = False,
    ) -> BlockCall | None:
        """Return the call of one view of a node, and add it to `found` with the calls that it needs."""
        if node in self.changed or (node in reached and not first):
            return None  # what reads a view was looked at before
        call = block_call(node, axis, self.forward.views)
        if call is None:
            return None
        for block in call.blocks:
            known = (
                self.sources.get(block.node) or self.calls.get(block.node) or found.get(block.node)
            )
            if known is not None and known[0] != block.axis:
                return None
            if known is None and self._call(block.node, block.axis, reached, found) is None:
                return None
        found[node] = axis, call
        return call

    def rewrite(self) -> list[str]:
        """Put the calls of one view in place, and repeat their results for other readers.

        Returns the modules of these readers.
        """
        graph, one = self.forward.graph, {n: source for n, (_, source) in self.sources.items()}
        for node in self.forward.calls():
            if node in self.calls:
                with graph.inserting_before(node):
                    one[node] = self._insert(node, self.calls[node][1], one)
            elif (view := self._view(node)) is not None:
                node.replace_all_uses_with(one[view])
                graph.erase_node(node)
        parted = dict.fromkeys(
            name for node in self.calls for name in self._repeat(node, one[node])
        )
        for node in reversed(list(graph.nodes)):
            if node in self.calls:
                graph.erase_node(node)
        return [*parted]

    def _insert(self, node: fx.Node, call: BlockCall, one: dict[fx.Node, fx.Node]) -> fx.Node:
        def replaced(value: object) -> object:
            if isinstance(value, Block):
                return one[value.node]
            return self.forward.size(value.node.expr) if isinstance(value, torch.SymInt) else value

        args, kwargs = pytree.tree_map(
            replaced, (call.args, dict(call.kwargs)), is_leaf=lambda v: isinstance(v, Block)
        )
        made = self.forward.graph.call_function(call.target, args, kwargs)
        made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return made

    def _view(self, node: fx.Node) -> fx.Node | None:
        """Return the node that a slice takes one of the views of."""
        if node.target is not aten.slice.Tensor:
            return None
        given = arguments(node)
        source, axis = given["self"], given["dim"] % len(shape_of(node))
        known = self.sources.get(source) or self.calls.get(source)
        whole = shape_of(source)[axis]
        single = same_size(shape_of(node)[axis] * self.forward.views, whole) and given["step"] == 1
        first = given["start"] in (None, 0)
        return source if known is not None and known[0] == axis and single and first else None

    def _repeat(self, node: fx.Node, single: fx.Node) -> Iterator[str]:
        """Repeat one view of a node for those that read all of them; yields the modules of these."""
        readers = [user for user in node.users if user not in self.calls]
        if not readers:
            return
        for size in [user for user in readers if user.target is aten.sym_size.int]:
            with self.forward.graph.inserting_before(size):
                size.replace_all_uses_with(self.forward.size(size.meta["val"].node.expr))
            readers.remove(size)
        axis = self.calls[node][0]
        with self.forward.graph.inserting_after(single):
            views = self.forward.graph.call_function(
                aten.cat.default, ([single] * self.forward.views, axis)
            )
        views.meta = dict(single.meta)
        for reader in readers:
            reader.replace_input_with(node, views)
            yield call_site(reader)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that share memory with what an operator writes to, in another way than `_in_turn`."""
    found: set[fx.Node] = set()
    related = families(graph)
    for node in graph.nodes:
        if node.op == "call_function" and writes(node) and not _in_turn(sorted(related[node])):
            found |= related[node]
    return found


def _in_turn(family: list[fx.Node]) -> bool:
    """Say whether all writing is done by operators in a row, from memory that is new, with no other reader between."""
    last = max((at for at, node in enumerate(family) if at and writes(node)), default=0)
    fresh = is_fresh(family[0]) and family[0].target is not aten.cat.default
    return fresh and all(
        writes(after) and shared_operands(after) == [before] and max(before.users) is after
        for before, after in itertools.pairwise(family[: last + 1])
    )
