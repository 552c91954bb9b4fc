"""The step graphs of a program: one for each shape of batch, captured on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import LoweredMethod, PenaltyTerm
from trainc.compiler.program.capture import capture, signature
from trainc.runtime.data.batch import Batch


class GraphCache:
    """Captures steps of one method on one model, and keeps them."""

    def __init__(
        self, model: nn.Module, method: LoweredMethod, sites: Sites, without: frozenset[str]
    ) -> None:
        self._model, self._method, self._sites, self._without = model, method, sites, without
        self._captured: dict[Any, StepGraph] = {}
        self._given: StepGraph | None = None
        self._newest: StepGraph | None = None

    @property
    def newest(self) -> StepGraph:
        """The graph for users: it exists before the first batch, and always holds the newest capture."""
        if self._newest is None:
            self._newest = StepGraph(self._model)
        return self._newest

    def use(self, graph: StepGraph) -> None:
        """Use a graph that was captured before for the batches that it accepts."""
        self._given = graph
        self.newest.install(graph)

    def get(
        self,
        batch: Batch,
        penalties: Mapping[str, PenaltyTerm],
        scalars: Callable[[], Mapping[str, Tensor]],
    ) -> StepGraph:
        """Return the graph for batches shaped like `batch`, with these penalties in its loss.

        One that is captured gets `scalars()` as examples.
        """
        terms = tuple(penalties)
        if self._given is not None and self._given.accepts(batch, terms):
            return self._given
        key = signature(self._model, batch), terms
        if key not in self._captured:
            training = self._model.training
            self._model.train()
            try:
                with self._sites.inactive():
                    self._captured[key] = capture(
                        self._model,
                        cast(Loss, self._method.loss),
                        batch,
                        rewrite=self._method.rewrite,
                        penalties={label: _one_mapping(p) for label, p in penalties.items()},
                        scalars=scalars(),
                        without=self._without,
                    )
            finally:
                self._model.train(training)
            self.newest.install(self._captured[key])
        return self._captured[key]


def _one_mapping(penalty: PenaltyTerm) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return a penalty that takes parameters and inputs in one mapping, as the graph passes them."""
    return lambda values: penalty.value({name: values[name] for name in penalty.parameters}, values)
