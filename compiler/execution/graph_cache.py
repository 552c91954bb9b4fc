"""The step graphs of a program, captured on first use: one for the first shape of batches, then one for many shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from trainc.compiler.errors import CompilerBug, GraphRefused, SiteMissing, SiteUnfit
from trainc.compiler.execution.capture import CaptureFailed, capture, signature
from trainc.compiler.graph.interface import describe_batch, shapes_of
from trainc.compiler.graph.sizes import Axes, Shapes, changing_axes
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.model.undisturbed import in_mode, keep_state
from trainc.runtime.data.batch import Batch, WrongOutput
from trainc.runtime.memory.failure import ran_out_of_memory
from trainc.runtime.schedule.clock import Clock

ATTEMPTS = 2
"""How many captures for many shapes may fail before every shape has a graph of its own."""
LIMIT = 8
"""How many graphs are captured before the bound modules run further shapes of batches: a capture takes seconds."""

Scalars = Callable[[], Mapping[str, Tensor]]
Trial = Callable[[StepGraph], None]
"""Runs a graph beside the bound modules; raises GraphRefused where it fails or computes something else."""


@dataclass(slots=True, eq=False)
class _Graphs:
    """The graphs of one state of the program: of one shape each, and of many; `seen` are the shapes of captures.

    `failures` counts the captures for many shapes that failed.
    """

    static: dict[Hashable, StepGraph] = field(default_factory=dict)
    open: list[StepGraph] = field(default_factory=list)
    seen: list[Shapes] = field(default_factory=list)
    failures: int = 0
    given_failed: bool = False

    def find(self, shape: Hashable, batch: Batch) -> StepGraph | None:
        """Return the graph that can run a batch of this shape."""
        graph = self.static.get(shape)
        return graph or next((one for one in reversed(self.open) if one.accepts(batch)), None)

    def add(self, shape: Hashable, graph: StepGraph) -> None:
        """Keep a graph."""
        if graph.is_open:
            self.open.append(graph)
        else:
            self.static[shape] = graph
            if graph.front_end == "torch.compile":  # which fixes every size
                self.failures = ATTEMPTS

    def drop(self, shape: Hashable, graph: StepGraph) -> None:
        """Give up a graph; after one for many shapes no further ones are captured."""
        if graph.is_open:
            self.open.remove(graph)
            self.failures = ATTEMPTS
        else:
            del self.static[shape]

    def axes(self, shapes: Shapes) -> Axes:
        """Return the axes that a graph captured for these shapes now can leave open."""
        if not self.seen or self.failures >= ATTEMPTS:
            return {}
        return changing_axes([*self.seen, shapes])


class GraphCache:
    """Captures steps of one method on one model, and keeps them."""

    def __init__(
        self,
        model: nn.Module,
        method: LoweredMethod,
        sites: Sites,
        clock: Clock,
        without: frozenset[str],
        *,
        one_size: bool = False,
    ) -> None:
        self._clock, self._one_size = clock, one_size
        self._model, self._method, self._sites, self._without = model, method, sites, without
        self._modules = tuple(model.modules())
        self._graphs: dict[Hashable, _Graphs] = {}
        self._trusted: dict[StepGraph, None] = {}
        self._last: _Graphs | None = None
        self._given: StepGraph | None = None
        self._newest: StepGraph | None = None
        self.refused: tuple[str, str] | None = None
        """Why no graph can run the steps of this model, as reason and detail, if one was tried."""
        self._notes: list[str] = []
        self._warned: set[str] = set()

    @property
    def newest(self) -> StepGraph:
        """The graph for users: it exists before the first batch, and always holds the newest capture."""
        if self._newest is None:
            self._newest = StepGraph(self._model)
        return self._newest

    @property
    def installed(self) -> StepGraph | None:
        """The newest capture, or the newest for many shapes if there is one beside it; None without a capture."""
        if self._newest is None or not self._newest.installed:
            return None
        return self._last.open[-1] if self._last is not None and self._last.open else self._newest

    def use(self, graph: StepGraph) -> None:
        """Use a graph that was captured before for the batches that it accepts."""
        self._given = graph
        self.newest.install(graph)

    def forget(self) -> None:
        """Drop every graph: the model has other modules or tensors now."""
        self._modules = tuple(self._model.modules())
        self._graphs.clear()
        self._trusted.clear()
        self._last = self._given = self._newest = self.refused = None

    def notes(self) -> tuple[str, ...]:
        """Return what to say of the graphs since the last call: warnings, and why the given one runs no batch."""
        found = tuple(dict.fromkeys(self._notes))
        self._notes.clear()
        return found

    def get(self, batch: Batch, scalars: Scalars) -> StepGraph:
        """Return the graph for batches shaped like `batch`; one that is captured gets `scalars()` as examples.

        Raises CaptureFailed, SiteMissing or SiteUnfit where there can be none.
        """
        graphs, shape = self._of(batch)
        found = graphs.find(shape, batch) or self._accepted(batch)
        if found is not None:
            return found
        graph = self._next(graphs, shape, batch, scalars())
        self._install(graphs, graph)
        return graph

    def trusted(self, batch: Batch, scalars: Scalars, trial: Trial, limit: int | None) -> StepGraph:
        """Return the graph for batches shaped like `batch`, once it has run beside the modules.

        Raises GraphRefused where no graph can run the step, and for new shapes after `limit` captures.
        """
        try:
            graphs, shape = self._of(batch)
        except TypeError as error:  # inputs that a graph cannot take
            raise GraphRefused(str(error)) from error
        graph = graphs.find(shape, batch)
        if graph is not None and graph in self._trusted:
            return graph
        if self.refused is not None:
            raise GraphRefused(*self.refused)
        if limit is not None and len(self._trusted) >= limit:
            raise GraphRefused(
                f"{limit} graphs were captured, for different shapes of batches (or trained parameters, modes"
                " of modules, loss terms); batches of other shapes run by the modules. Pad batches to fewer lengths to"
                " run them as graphs"
            )
        try:
            graph = self._tested(graphs, shape, batch, scalars, trial)
        except (CaptureFailed, SiteMissing, SiteUnfit) as error:
            self.refused = f"{type(error).__name__}: {error}".splitlines()[0], ""
            raise GraphRefused(*self.refused) from error
        except GraphRefused as error:
            self.refused = error.reason, error.detail
            raise
        self._trusted[graph] = None
        self._notes += [text for text in graph.warnings if text not in self._warned]
        self._warned.update(graph.warnings)
        self._install(graphs, graph)
        return graph

    def _install(self, graphs: _Graphs, graph: StepGraph) -> None:
        self._last = graphs
        self.newest.install(graph)

    def _of(self, batch: Batch) -> tuple[_Graphs, Hashable]:
        """Return the graphs for the present state of the program and batches like this, and the batch's shape.

        Some modules may have a mode of their own.
        """
        rewrite = self._rewrite
        structure, ports, *others = signature(self._model, batch)
        inputs = tuple((p.name, p.key, len(p.shape), p.dtype, p.device) for p in ports)
        modes = tuple(module.training for module in self._modules)
        views = rewrite.views, rewrite.share_dropout, rewrite.mean_loss
        hooks = tuple(site.index for site in rewrite.hooks)
        measured = tuple(site.module for site in rewrite.measured)
        outputs = tuple(rewrite.terms), bool(rewrite.observers)
        key = structure, inputs, *others, modes, outputs, views, hooks, measured
        return self._graphs.setdefault(key, _Graphs()), tuple(port.shape for port in ports)

    @property
    def _rewrite(self) -> Rewrite:
        """What changes in the forward pass of this step."""
        return self._method.rewrite.at(self._clock)

    def _accepted(self, batch: Batch) -> StepGraph | None:
        """Return the graph that was given where it can take a batch."""
        given, rewrite = self._given, self._rewrite
        if given is None or given.interface is None:
            return None
        hooks = tuple(site.index for site in rewrite.hooks)
        if (given.interface.views, given.interface.hooks) != (rewrite.views, hooks):
            return None
        if set(given.interface.probes) != {site.module for site in rewrite.measured}:
            return None
        if rewrite.observers and "logits" not in given.interface.outputs:
            return None
        return given if given.accepts(batch, tuple(rewrite.terms)) else None

    def _tested(
        self, graphs: _Graphs, shape: Hashable, batch: Batch, scalars: Scalars, trial: Trial
    ) -> StepGraph:
        """Return a graph that has passed its trial: the one that was given, else a fresh one."""
        unused = None
        if not graphs.given_failed and (given := self._accepted(batch)) is not None:
            try:
                trial(given)
            except GraphRefused as error:  # It was captured with other modes or parameters.
                unused = str(error)
                graphs.given_failed = True
            else:
                graphs.add(shape, given)
                graphs.seen.append(self._shapes(batch, scalars()))
                return given
        graph = graphs.find(shape, batch) or self._next(graphs, shape, batch, scalars())
        try:
            trial(graph)
        except GraphRefused:
            graphs.drop(shape, graph)
            if not graph.is_open:
                raise
            graph = self._next(graphs, shape, batch, scalars())
            trial(graph)
        if unused is not None:
            self._notes.append(
                f"the saved graph was not used: {unused}. A new one was captured in its place"
            )
        return graph

    def _shapes(self, batch: Batch, scalars: Mapping[str, Tensor]) -> Shapes:
        """Return the shapes of a batch, and of what terms read of its samples and of companions."""
        of_batch = {
            name: tuple(tensor.shape)
            for term in self._rewrite.terms.values()
            for one in term.companions
            for name, tensor in one.of(scalars).items()
        }
        of_batch |= {
            name: tuple(scalars[name].shape)
            for term in self._rewrite.terms.values()
            for name in term.by_sample
        }
        return {**shapes_of(describe_batch(batch)[1]), **of_batch}

    def _next(
        self, graphs: _Graphs, shape: Hashable, batch: Batch, scalars: Mapping[str, Tensor]
    ) -> StepGraph:
        """Capture a graph: for this shape the first time, then for many where that is possible."""
        shapes = self._shapes(batch, scalars)
        axes, reason, graph = {} if self._one_size else graphs.axes(shapes), None, None
        if axes:
            try:
                graph = self._capture(batch, scalars, axes)
            # Whatever stops it, a graph for this shape alone may do; its capture says what is wrong with the model.
            except Exception as error:
                if ran_out_of_memory(error):
                    raise
                graphs.failures += 1
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if graph is None:
            graph = self._capture(batch, scalars)
        if reason is not None:
            graph.notes += (f"a graph for more sizes than these cannot be captured: {reason}",)
        graphs.seen.append(shapes)
        graphs.add(shape, graph)
        return graph

    def _capture(
        self, batch: Batch, scalars: Mapping[str, Tensor], axes: Axes | None = None
    ) -> StepGraph:
        with self._sites.inactive(), keep_state(self._model), _in_train_mode(self._model):
            try:
                return capture(
                    self._model,
                    self._method.losses,
                    batch,
                    rewrite=self._rewrite,
                    scalars=scalars,
                    sites=self._sites,
                    without=self._without,
                    axes=axes,
                )
            except (CaptureFailed, SiteMissing, SiteUnfit, CompilerBug, WrongOutput, ValueError):
                raise
            except Exception as error:
                raise CompilerBug(
                    "capture",
                    f'{type(error).__name__}: {error}. `executor = "module"` trains without a graph',
                ) from error


def _in_train_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put a model in train mode unless it is: some modules of one in train mode may be in eval mode on purpose."""
    return nullcontext() if model.training else in_mode(model, training=True)
