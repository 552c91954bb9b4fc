"""Run one micro-batch by the bound modules or as one graph, whichever can, and return its results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from trainc.compiler.errors import CompilerBug, GraphRefused
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.graph.trial import TrialResult, difference
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.eager import eager_operations
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.model.user_hooks import UserHooks
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.program.distributed import first_shard
from trainc.compiler.program.graph_cache import LIMIT, GraphCache
from trainc.compiler.program.module_runner import ModuleRunner
from trainc.runtime.data.batch import Batch, copy_inputs
from trainc.runtime.schedule.clock import Clock

Executor = Literal["auto", "graph", "module"]


class Execution(ModuleRunner):
    """Runs micro-batches of one program over one model, by the modules or as a graph."""

    def __init__(
        self,
        model: nn.Module,
        method: LoweredMethod,
        seed: int,
        clock: Clock,
        executor: Executor,
        without: frozenset[str],
    ) -> None:
        super().__init__(model, method, seed, clock)
        self.executor = executor
        self.graphs = GraphCache(model, method, self.sites, clock, without)
        self._user_hooks = UserHooks(model)
        self.refused: str | None = None
        """Why the last micro-batch ran by the modules although a graph was wanted."""
        self.reasons: list[str] = []
        """Every such reason, each once."""

    def run(
        self, batch: Batch, where: MicroBatchSlice, scaler: torch.amp.GradScaler | None = None
    ) -> MicroBatchResult:
        """Run forward and backward of a micro-batch, add to `.grad`, and return the results.

        It runs as a graph where the executor is `graph`, or is `auto` and the forward pass is rewritten; by the bound
        modules otherwise, with a `scaler` of the loss, and where no graph can run it: then the results have a note that
        says why. Raises GraphRefused in the last case if the executor is `graph`.
        """
        notes: tuple[str, ...] = ()
        self.refused = None
        if scaler is None and self._wants_graph:
            try:
                return self.run_graph(batch, where)[1]
            except GraphRefused as error:
                if self.executor == "graph":
                    raise
                notes = self._record_reason(str(error))
        total, result = self.run_modules(batch, where)
        (total if scaler is None else scaler.scale(total)).backward()
        result.notes = notes
        return result

    @property
    def _wants_graph(self) -> bool:
        if self.executor == "auto":
            return bool(self.rewrite) and self.module.training and self.forward is self.module
        return self.executor == "graph"

    def _record_reason(self, reason: str) -> tuple[str, ...]:
        """Keep the reason why modules run, and return the notes that say it: none the second time."""
        self.refused = reason
        if reason in self.reasons:
            return ()
        self.reasons.append(reason)
        return (f"the bound modules run instead of a graph: {reason}",)

    def _reason_for_modules(self) -> str | None:
        """Return why a graph cannot run the next micro-batch, whatever its shape; None where it can."""
        if not self.module.training:
            return "the model is in eval mode: call `model.train()` first"
        if self.forward is not self.module:
            wrapper = type(self.forward).__name__
            return f"`program.forward` is a {wrapper}, which a graph does not call"
        if self.method.rewrite.modules_only is not None:
            return self.method.rewrite.modules_only
        if first_shard(self.parameters) is not None:
            return "sharded parameters (FSDP2) are gathered module by module"
        hook = self._user_hooks.find(self.parameters)
        return None if hook is None else f"{hook}, and a graph does not call hooks"

    # as a graph

    def capture(self, batch: Batch) -> StepGraph:
        """Return the graph for batches shaped like `batch`, captured on first use."""
        return self.graphs.get(batch, partial(self._graph_scalars, batch))

    def _trusted(self, batch: Batch) -> StepGraph:
        """Return the graph for a batch; raises GraphRefused where only the bound modules can run it."""
        reason = self._reason_for_modules()
        if reason is not None:
            raise GraphRefused(reason)
        self._check_preconditions(batch)
        limit = LIMIT if self.executor == "auto" else None
        scalars = partial(self._graph_scalars, batch)
        return self.graphs.trusted(batch, scalars, partial(self._try, batch), limit)

    def run_graph(self, batch: Batch, where: MicroBatchSlice) -> tuple[Tensor, MicroBatchResult]:
        """Run forward and backward as a graph, add to `.grad`, and return the loss with what is left.

        Raises GraphRefused where only the bound modules can run this micro-batch; then nothing has changed.
        """
        graph = self._trusted(batch)
        out = graph.run(batch, self._graph_scalars(batch, where))
        self._covered = True
        for name, gradient in out.grads.items():
            if gradient is not None:
                self._add_gradient(name, gradient)
        terms = {}
        if out.consistency is not None:
            terms = {"data_loss": out.data_loss, "consistency": out.consistency}
        terms |= out.terms
        result = self._result(batch, where.loss_weight, out.loss, terms)
        self.statistics.record_graph(result, out.probes, out.grads)
        return out.total, result

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        """Accumulate a parameter's gradient where the optimizer reads it."""
        mask = self.method.masks.get(name)
        if mask is not None:
            mask.take(gradient)
            return
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def gradients(
        self,
        batch: Batch,
        where: MicroBatchSlice,
        scaler: torch.amp.GradScaler | None = None,
        of: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the gradients that one micro-batch adds to the step, by parameter, without adding them.

        No statistic is kept, and replicas average nothing. With a `scaler` the loss is scaled. With `of` they are those
        of these tensors, by the bound modules.
        """
        if of is None:
            batch = copy_inputs(batch)
        scalars = self._graph_scalars(batch, where)
        found = None
        if scaler is None and of is None and self._wants_graph:
            try:
                found = self._trial_graph(self._trusted(batch), batch, scalars)
            except GraphRefused:
                if self.executor == "graph":
                    raise  # for others the passes of the step say why
        if found is None:
            self._check_preconditions(batch)
            found = self._trial_modules(batch, scalars, where.loss_weight, scaler, of)
        return {n: gradient for n, gradient in found.gradients.items() if gradient is not None}

    # what is compared

    def _try(self, batch: Batch, graph: StepGraph) -> None:
        """Run a graph beside the bound modules, changing nothing; raises GraphRefused where it fails or differs."""
        with undisturbed(self.module), eager_operations():
            modules = self._trial_modules(copy_inputs(batch), self._graph_scalars(batch))
        try:
            with undisturbed(self.module):
                found = self._trial_graph(graph, copy_inputs(batch), self._graph_scalars(batch))
        except CompilerBug:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise GraphRefused(f"the captured graph fails when it runs: {what}") from error
        dtypes = {p.dtype for p in self.parameters.values()}
        device = batch[1].device.type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        if (gap := difference(found, modules, dtypes)) is not None:
            raise GraphRefused(
                f"the captured graph computes something else than the modules: {gap}"
            )

    def trial(
        self, batch: Batch, executor: Literal["graph", "module"], strength: float | None = None
    ) -> TrialResult:
        """Return the differentiated loss, the gradients and per-example squared norms by one executor.

        No gradient is accumulated. With `strength` every scheduled number of the rewrite and of the loss terms has
        that value.
        """
        scalars = self._graph_scalars(batch)
        if strength is not None:
            scalars |= {n: torch.full_like(scalars[n], strength) for n in self.method.scalars}
        self._check_preconditions(batch)
        if executor == "graph":
            return self._trial_graph(self.capture(batch), batch, scalars)
        return self._trial_modules(batch, scalars)

    def _trial_graph(
        self, graph: StepGraph, batch: Batch, scalars: Mapping[str, Tensor]
    ) -> TrialResult:
        out = graph.run(batch, scalars)
        return TrialResult(out.total, out.grads, self.statistics.squares(out.probes))
