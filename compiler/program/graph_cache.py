"""The step graphs of a program: one for each shape of batch, captured on first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from trainc.compiler.errors import CompilerBug, GraphRefused, SiteMissing, SiteUnfit
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import LoweredMethod, PenaltyTerm
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.model.undisturbed import keep_state
from trainc.compiler.program.capture import CaptureFailed, capture, signature
from trainc.runtime.data.batch import Batch
from trainc.runtime.schedule.clock import Clock

LIMIT = 8
"""How many graphs are captured before the bound modules run further shapes of batches: a capture takes seconds."""

Scalars = Callable[[], Mapping[str, Tensor]]
Trial = Callable[[StepGraph], None]
"""Runs a graph beside the bound modules; raises GraphRefused where it fails or computes something else."""


class GraphCache:
    """Captures steps of one method on one model, and keeps them."""

    def __init__(
        self,
        model: nn.Module,
        method: LoweredMethod,
        sites: Sites,
        clock: Clock,
        without: frozenset[str],
    ) -> None:
        self._clock = clock
        self._model, self._method, self._sites, self._without = model, method, sites, without
        self._modules = tuple(model.modules())
        self._captured: dict[Hashable, StepGraph] = {}
        self._trusted: dict[Hashable, StepGraph] = {}
        self._given: StepGraph | None = None
        self._newest: StepGraph | None = None
        self._refused: str | None = None

    @property
    def newest(self) -> StepGraph:
        """The graph for users: it exists before the first batch, and always holds the newest capture."""
        if self._newest is None:
            self._newest = StepGraph(self._model)
        return self._newest

    @property
    def installed(self) -> StepGraph | None:
        """The newest capture; None where there is none."""
        return self._newest if self._newest is not None and self._newest.installed else None

    def use(self, graph: StepGraph) -> None:
        """Use a graph that was captured before for the batches that it accepts."""
        self._given = graph
        self.newest.install(graph)

    def get(self, batch: Batch, scalars: Scalars) -> StepGraph:
        """Return the graph for batches shaped like `batch`; one that is captured gets `scalars()` as examples.

        Raises CaptureFailed, SiteMissing or SiteUnfit where there can be none.
        """
        key = self._key(batch)
        graph = self._trusted.get(key) or self._captured.get(key) or self._accepted(batch)
        if graph is None:
            graph = self._captured[key] = self._capture(batch, scalars)
            self.newest.install(graph)
        return graph

    def trusted(self, batch: Batch, scalars: Scalars, trial: Trial, limit: int | None) -> StepGraph:
        """Return the graph for batches shaped like `batch`, once it has run beside the modules.

        Raises GraphRefused where no graph can run the step, and for new shapes after `limit` captures.
        """
        try:
            key = self._key(batch)
        except TypeError as error:  # inputs that a graph cannot take
            raise GraphRefused(str(error)) from error
        if key in self._trusted:
            return self._trusted[key]
        if self._refused is not None:
            raise GraphRefused(self._refused)
        if limit is not None and len(self._trusted) >= limit:
            raise GraphRefused(
                f"{limit} graphs were captured, for {limit} different shapes of batches (or trained parameters, modes"
                " of modules, loss terms); batches of other shapes run by the modules. Pad batches to fewer lengths to"
                " run them as graphs"
            )
        try:
            self._trusted[key] = self._tested(key, batch, scalars, trial)
        except (CaptureFailed, SiteMissing, SiteUnfit) as error:
            self._refused = f"{type(error).__name__}: {error}".splitlines()[0]
            raise GraphRefused(self._refused) from error
        except GraphRefused as error:
            self._refused = str(error)
            raise
        self.newest.install(self._trusted[key])
        return self._trusted[key]

    def _key(self, batch: Batch) -> Hashable:
        """Return what decides which graph can run a batch now; some modules may have a mode of their own."""
        rewrite = self._rewrite
        modes = tuple(module.training for module in self._modules)
        noisy = tuple(site.module for site in rewrite.noises)
        return signature(self._model, batch), modes, tuple(self._penalties), rewrite.views, noisy

    @property
    def _rewrite(self) -> Rewrite:
        """What changes in the forward pass of this step."""
        return self._method.rewrite.at(self._clock)

    @property
    def _penalties(self) -> Mapping[str, PenaltyTerm]:
        """The terms that are in the loss of this step."""
        return self._method.open_penalties(self._clock)

    def _accepted(self, batch: Batch) -> StepGraph | None:
        """Return the graph that was given where it can take a batch."""
        given, rewrite = self._given, self._rewrite
        if given is None or given.interface is None or given.interface.views != rewrite.views:
            return None
        return given if given.accepts(batch, tuple(self._penalties)) else None

    def _tested(self, key: Hashable, batch: Batch, scalars: Scalars, trial: Trial) -> StepGraph:
        """Return a graph that has passed its trial: the one that was given, else a fresh one."""
        if (given := self._accepted(batch)) is not None:
            try:
                trial(given)
            except GraphRefused:
                pass  # It was captured with other modes or other trained parameters.
            else:
                return given
        graph = self._captured.pop(key, None) or self._capture(batch, scalars)
        trial(graph)
        return graph

    def _capture(self, batch: Batch, scalars: Scalars) -> StepGraph:
        with self._sites.inactive(), keep_state(self._model), _in_train_mode(self._model):
            try:
                return capture(
                    self._model,
                    cast(Loss, self._method.loss),
                    batch,
                    rewrite=self._rewrite,
                    penalties={n: _one_mapping(p) for n, p in self._penalties.items()},
                    scalars=scalars(),
                    without=self._without,
                )
            except (CaptureFailed, SiteMissing, SiteUnfit, CompilerBug, ValueError):
                raise
            except Exception as error:
                raise CompilerBug(
                    "capture",
                    f'{type(error).__name__}: {error}. `executor = "module"` trains without a graph',
                ) from error


@contextmanager
def _in_train_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in train mode unless it is, and every module back in its own mode afterwards.

    A model in train mode stays as it is: some of its modules may be in eval mode.
    """
    if model.training:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _one_mapping(penalty: PenaltyTerm) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return a penalty that takes parameters and inputs in one mapping, as the graph passes them."""
    return lambda values: penalty.value({name: values[name] for name in penalty.parameters}, values)
