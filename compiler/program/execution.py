"""Run one micro-batch, by the bound modules or as one graph, and keep its results for the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import Sites, replace_layers
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.loss import LOSS_WEIGHT, Loss
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.per_example.brute_force import measure_one_by_one
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.per_example.preconditions import check_preconditions
from trainc.compiler.per_example.statistics import Statistics
from trainc.compiler.program.distributed import (
    exchanges_now,
    first_shard,
    refuse_shards,
    replicas_of,
)
from trainc.compiler.program.graph_cache import GraphCache
from trainc.compiler.program.paired_loss import paired_loss
from trainc.compiler.program.scalars import noise_scalars, scheduled_scalars
from trainc.runtime.data.batch import Batch, compute_logits, repeat_views, split_batch
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.record import CalibrationSample
from trainc.runtime.step.replicas import Replicas

Executor = Literal["auto", "graph", "module"]
WHOLE_STEP = MicroBatchSlice()


class Execution:
    """Runs micro-batches of one program over one model."""

    def __init__(
        self,
        model: nn.Module,
        method: LoweredMethod,
        seed: int,
        clock: Clock,
        executor: Executor,
        without: frozenset[str],
    ) -> None:
        self.module = model
        self.forward: Any = model
        self.method = method
        self.loss_fn = cast(Loss, method.loss)
        self.seed, self.clock, self.executor = seed, clock, executor
        self.parameters = dict(model.named_parameters())
        self.sites: Sites = replace_layers(model, method.rewrite)
        self.graphs = GraphCache(model, method, self.sites, without)
        self.refused: str | None = None
        self.exchange_group: ReplicaGroup | None = None
        """The processes that this one exchanges with after steps; their gradients are their own."""
        self.statistics = Statistics(method, self.parameters)
        self._rewrites, self._views = bool(method.rewrite), method.rewrite.views
        self._plain = not (method.rewrite or method.penalties or executor == "graph")
        self._covered = not method.rewrite
        self._checked = not method.rewrite.measured

    @property
    def replicas(self) -> Replicas | None:
        """The processes that average gradients with this one; None where it trains alone."""
        return replicas_of(self.forward, self.module, self.parameters)

    @property
    def peers(self) -> ReplicaGroup | None:
        """The other processes that run this program, whatever joins them; None where this one trains alone."""
        return self.exchange_group or self.replicas

    # module by module

    def run_modules(self, batch: Batch, where: MicroBatchSlice) -> tuple[Tensor, MicroBatchResult]:
        """Return the loss to differentiate, and the micro-batch's results, complete after the backward pass."""
        whose = "a micro-batch's or replica's own"
        instead = "write `method = per_example`, which needs no such gradient"
        refuse_shards(whose, self.method.batch_gradients, self.parameters, instead)
        self._check_preconditions(batch)
        scalars = self._scalars(where, batch[1].device)
        if self._rewrites:
            self._activate(batch, scalars)
        unchecked = self.module.training and not self._covered
        counting: AbstractContextManager[dict[str, int]]
        counting = self.sites.count_calls() if unchecked else nullcontext({})
        with counting as counts:
            total, loss, terms = self._forward(batch, where.loss_weight, scalars)
        self.sites.check_coverage(counts)
        self._covered |= unchecked
        result = self._result(batch, where.loss_weight, loss, terms)
        if self.statistics.wanted:
            result.probes = self.sites.probes()
            result.training = self.module.training
            result.synchronised = exchanges_now(self.forward, self.module)
            self.statistics.watch(result, total)
        return total, result

    def _check_preconditions(self, batch: Batch) -> None:
        """Check once that per-example statistics can be measured on this model and loss."""
        if not self._checked and self.module.training:
            self._checked = check_preconditions(self.module, self.sites, batch, self.loss_fn)

    def _forward(
        self, batch: Batch, loss_weight: float, scalars: Mapping[str, Tensor], forward: Any = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss to differentiate, the loss without its weight, and the loss terms by name."""
        inputs, targets = batch
        called = self.forward if forward is None else forward
        logits = compute_logits(called, repeat_views(inputs, self._views))
        pairing = self.method.rewrite.pairing
        loss, terms = paired_loss(self.loss_fn, pairing, logits, targets, scalars)
        total = loss if loss_weight == 1.0 else loss * scalars[LOSS_WEIGHT]
        for label, penalty in self.method.open_penalties(self.clock).items():
            value = penalty.value({n: self.parameters[n] for n in penalty.parameters}, scalars)
            terms[label] = value.detach()
            total = total + (value if loss_weight == 1.0 else value * scalars[LOSS_WEIGHT])
        return total, loss, terms

    # as a graph

    @property
    def wants_graph(self) -> bool:
        """Whether the next micro-batch runs as a graph."""
        if self.executor == "module" or self.refused is not None or not self.module.training:
            return False
        if self.executor != "graph" and not (self._rewrites and self.forward is self.module):
            return False
        self.refused = self.method.rewrite.modules_only
        if first_shard(self.parameters) is not None:
            self.refused = "sharded parameters (FSDP2) are gathered module by module"
        return self.refused is None

    def capture(self, batch: Batch) -> StepGraph:
        """Return the graph of this step for batches shaped like `batch`, captured on first use."""
        penalties = self.method.open_penalties(self.clock)
        return self.graphs.get(
            batch, penalties, lambda: self._scalars(MicroBatchSlice(), batch[1].device)
        )

    def _captured(self, batch: Batch) -> StepGraph | None:
        """Return the graph for a batch; None where the model cannot be captured, and `refused` says why."""
        try:
            return self.capture(batch)
        except Exception as error:
            if self.executor == "graph":
                raise
            self.refused = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def run_graph(self, batch: Batch, where: MicroBatchSlice) -> tuple[Tensor, MicroBatchResult]:
        """Run forward and backward as a graph, add to `.grad`, and return the loss with what is left.

        Where the model cannot be captured the bound modules run instead, and `refused` says why.
        """
        self._check_preconditions(batch)
        graph = self._captured(batch)
        if graph is None:
            total, result = self.run_modules(batch, where)
            total.backward()
            return total.detach(), result
        out = graph.run(batch, self._scalars(where, batch[1].device))
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
        selected = self.method.selected_entries.get(name)
        if selected is not None:
            selected.take(gradient)
            return
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def gradients(
        self, batch: Batch, where: MicroBatchSlice, scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, Tensor]:
        """Return the gradients that one micro-batch adds to the step, by parameter, without adding them.

        No statistic is kept, and replicas average nothing. With a `scaler` the loss is scaled.
        """
        as_graph = scaler is None and self.wants_graph and self._captured(batch) is not None
        found = self.trial(batch, "graph" if as_graph else "module", None, where, scaler)[1]
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    # what `verify` compares

    def trial(
        self,
        batch: Batch,
        executor: Literal["graph", "module"],
        strength: float | None = None,
        where: MicroBatchSlice = WHOLE_STEP,
        scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """Return the differentiated loss, the gradients and per-example squared norms by one executor.

        No gradient is accumulated. With `strength` every scheduled number of the rewrite and of the loss terms has
        that value.
        """
        scalars = self._scalars(where, batch[1].device)
        if strength is not None:
            scalars |= {n: torch.full_like(scalars[n], strength) for n in self.method.scalars}
        self._check_preconditions(batch)
        if executor == "graph":
            out = self.capture(batch).run(batch, scalars)
            return out.total, out.grads, self.statistics.squares(out.probes)
        self._activate(batch, scalars)
        try:
            # DistributedDataParallel expects every forward pass to be followed by an exchange of gradients.
            forward = self.forward if self.replicas is None else self.module
            total, _, _ = self._forward(batch, where.loss_weight, scalars, forward)
            total = total if scaler is None else scaler.scale(total)
            named = {n: p for n, p in self.parameters.items() if p.requires_grad}
            probes = self.sites.probes()
            wanted = [*named.values(), *probes.values()]
            found = torch.autograd.grad(total, wanted, allow_unused=True)
        finally:
            self.sites.deactivate()
        squares = dict(zip(probes, found[len(named) :], strict=True))
        gradients: dict[str, Tensor | None] = dict(zip(named, found, strict=False))
        return total.detach(), gradients, self.statistics.squares(squares)

    def contributions(self, batch: Batch) -> dict[str, Tensor]:
        """Return per-example squared norms by brute force: one backward pass per example, module by module.

        Each example has the noise it has in the whole batch; loss terms over parameters contribute to no example.
        """
        return self._one_by_one(batch, self.statistics.parameters).sq_norms

    def calibrate(self, batch: Batch, examples: int) -> CalibrationSample:
        """Measure every trainable parameter on the first `examples` of each replica's micro-batch; no state changes."""
        first = split_batch(batch, examples)[0]
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        instead = "remove `calibrate`, or measure `on all` in every step"
        refuse_shards("an example's own", names, self.parameters, instead)
        with undisturbed(self.module):
            return self._one_by_one(first, names, self.replicas)

    def _one_by_one(
        self, batch: Batch, names: Sequence[str], replicas: Replicas | None = None
    ) -> CalibrationSample:
        pairing = self.method.rewrite.pairing

        def loss_of(example: int, one: Batch) -> Tensor:
            scalars = self._scalars(MicroBatchSlice(first_example=example), batch[1].device)
            self._activate(one, scalars)
            logits = compute_logits(self.module, repeat_views(one[0], self._views))
            return paired_loss(self.loss_fn, pairing, logits, one[1], scalars)[0]

        self._check_preconditions(batch)
        try:
            parameters = {name: self.parameters[name] for name in names}
            return measure_one_by_one(
                batch, self.loss_fn.weights(batch[1]), loss_of, parameters, replicas
            )
        finally:
            self.sites.deactivate()

    # inside

    def _result(
        self, batch: Batch, loss_weight: float, loss: Tensor, terms: dict[str, Tensor]
    ) -> MicroBatchResult:
        # A closed term is 0, so that the terms of every step add up to its loss.
        terms |= {n: torch.zeros_like(loss) for n in self.method.penalties if n not in terms}
        if loss_weight != 1.0:
            loss, terms = loss * loss_weight, {n: t * loss_weight for n, t in terms.items()}
        result = MicroBatchResult(None, loss.detach(), terms)
        if self.statistics.wanted:
            self.statistics.weigh(result, self.loss_fn, batch, loss_weight)
        return result

    def _scalars(self, where: MicroBatchSlice, device: torch.device) -> dict[str, Tensor]:
        """Return this micro-batch's numbers by name; without rewrite, penalties and accumulation there are none."""
        if self._plain and where.loss_weight == 1.0:
            return {}
        scalars = scheduled_scalars(self.method, where, self.clock, self._dtype(), device)
        if self.method.rewrite.pairing is not None or self.method.rewrite.noises:
            scalars |= noise_scalars(
                self.seed, self.clock.steps, self.peers, where.first_example, device
            )
        return scalars

    def _dtype(self) -> torch.dtype:
        """Return the dtype of scheduled numbers and statistics: float64 for float64 models, else float32."""
        double = any(p.dtype == torch.float64 for p in self.parameters.values())
        return torch.float64 if double else torch.float32

    def _activate(self, batch: Batch, scalars: Mapping[str, Tensor]) -> None:
        units, targets = self.method.rewrite.example_units, batch[1]
        self.sites.activate(
            ExampleIndex(targets.shape[0]) if units is None else units.divide(batch),
            scalars, self._dtype(), targets.device,
        )  # fmt: skip
