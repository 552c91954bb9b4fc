"""Run one micro-batch by the bound modules, or one example at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainc.compiler.graph.trial import TrialResult
from trainc.compiler.layers.bound_modules import Sites, replace_layers
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.loss import LOSS_WEIGHT, Loss
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import Pairing, Rewrite
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.per_example.brute_force import measure_one_by_one
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.per_example.preconditions import check_preconditions
from trainc.compiler.per_example.statistics import Statistics
from trainc.compiler.program.distributed import (
    exchanges_now,
    refuse_shards,
    replicas_of,
)
from trainc.compiler.program.scalars import noise_scalars, scheduled_scalars
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency
from trainc.runtime.data.batch import Batch, compute_logits, copy_inputs, repeat_views, split_batch
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.record import CalibrationSample
from trainc.runtime.step.replicas import Replicas


class ModuleRunner:
    """Runs micro-batches of one program by the modules of its model."""

    def __init__(self, model: nn.Module, method: LoweredMethod, seed: int, clock: Clock) -> None:
        self.module = model
        self.forward: Any = model
        self.method = method
        self.loss_fn = cast(Loss, method.loss)
        self.seed, self.clock = seed, clock
        self.parameters = dict(model.named_parameters())
        self.sites: Sites = replace_layers(model, method.rewrite)
        self.exchange_group: ReplicaGroup | None = None
        """The processes that this one exchanges with after steps; their gradients are their own."""
        self.statistics = Statistics(method, self.parameters)
        self._rewrites = bool(method.rewrite)
        self._plain = not (method.rewrite or method.penalties)
        self._covered = not method.rewrite
        self._checked = not method.rewrite.measured

    @property
    def rewrite(self) -> Rewrite:
        """What changes in the forward pass of this step."""
        return self.method.rewrite.at(self.clock)

    @property
    def replicas(self) -> Replicas | None:
        """The processes that average gradients with this one; None where it trains alone."""
        return replicas_of(self.forward, self.module, self.parameters)

    @property
    def peers(self) -> ReplicaGroup | None:
        """The other processes that run this program, whatever joins them; None where this one trains alone."""
        return self.exchange_group or self.replicas

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
            total, loss, terms = self._forward(self.forward, batch, where.loss_weight, scalars)
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
        self, model: Any, batch: Batch, loss_weight: float, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss to differentiate, the loss without its weight, and the loss terms by name."""
        inputs, targets = batch
        rewrite = self.rewrite
        logits = compute_logits(model, repeat_views(inputs, rewrite.views))
        loss, terms = _paired_loss(self.loss_fn, rewrite.pairing, logits, targets, scalars)
        total = loss if loss_weight == 1.0 else loss * scalars[LOSS_WEIGHT]
        for label, penalty in self.method.open_penalties(self.clock).items():
            value = penalty.value({n: self.parameters[n] for n in penalty.parameters}, scalars)
            terms[label] = value.detach()
            total = total + (value if loss_weight == 1.0 else value * scalars[LOSS_WEIGHT])
        return total, loss, terms

    def _trial_modules(
        self,
        batch: Batch,
        scalars: Mapping[str, Tensor],
        loss_weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
        of: Mapping[str, Tensor] | None = None,
    ) -> TrialResult:
        """Return what the modules compute; no gradient is accumulated and no statistic kept.

        The gradients are of the parameters that train, or of the tensors `of`.
        """
        self._activate(batch, scalars)
        # DistributedDataParallel expects every forward pass to be followed by an exchange of gradients.
        forward = self.forward if self.replicas is None else self.module
        try:
            with self.statistics.paused():
                total, _, _ = self._forward(forward, batch, loss_weight, scalars)
                total = total if scaler is None else scaler.scale(total)
                trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
                named = trained if of is None else of
                probes = self.sites.probes()
                wanted = [*named.values(), *probes.values()]
                found = torch.autograd.grad(total, wanted, allow_unused=True)
        finally:
            self.sites.deactivate()
        squares = {n: g for n, g in zip(probes, found[len(named) :], strict=True) if g is not None}
        gradients: dict[str, Tensor | None] = dict(zip(named, found, strict=False))
        return TrialResult(total.detach(), gradients, self.statistics.squares(squares))

    def contributions(self, batch: Batch) -> dict[str, Tensor]:
        """Return per-example squared norms by brute force: one backward pass per example, module by module.

        Each example has the noise it has in the whole batch; loss terms over parameters contribute to no example.
        """
        return self._one_by_one(batch, self.statistics.parameters).sq_norms

    def calibrate(self, batch: Batch, examples: int) -> CalibrationSample:
        """Measure every trainable parameter on the first `examples` of each replica's micro-batch; no state changes."""
        first = copy_inputs(split_batch(batch, examples)[0])
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        instead = "remove `calibrate`, or measure `on all` in every step"
        refuse_shards("an example's own", names, self.parameters, instead)
        with undisturbed(self.module):
            return self._one_by_one(first, names, self.replicas)

    def _one_by_one(
        self, batch: Batch, names: Sequence[str], replicas: Replicas | None = None
    ) -> CalibrationSample:
        rewrite = self.rewrite

        def loss_of(example: int, one: Batch) -> Tensor:
            scalars = self._scalars(MicroBatchSlice(first_example=example), batch[1].device)
            self._activate(one, scalars)
            logits = compute_logits(self.module, repeat_views(one[0], rewrite.views))
            return _paired_loss(self.loss_fn, rewrite.pairing, logits, one[1], scalars)[0]

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
        closed = [label for label in self.method.penalties if label not in terms]
        if self.method.rewrite.pairing is not None and "consistency" not in terms:
            terms["data_loss"] = loss.detach()
            closed.append("consistency")
        terms |= {name: torch.zeros_like(loss) for name in closed}
        if loss_weight != 1.0:
            loss, terms = loss * loss_weight, {n: t * loss_weight for n, t in terms.items()}
        result = MicroBatchResult(None, loss.detach(), terms)
        if self.statistics.wanted:
            self.statistics.weigh(result, self.loss_fn, batch, loss_weight)
        return result

    def _scalars(self, where: MicroBatchSlice, device: torch.device) -> dict[str, Tensor]:
        """Return the numbers of modules by name; without rewrite, penalties and accumulation there are none."""
        if self._plain and where.loss_weight == 1.0:
            return {}
        return self._all_scalars(where, device)

    def _graph_scalars(
        self, batch: Batch, where: MicroBatchSlice | None = None
    ) -> dict[str, Tensor]:
        """Return the numbers of a graph by name: one graph serves with and without accumulation."""
        return self._all_scalars(where or MicroBatchSlice(), batch[1].device)

    def _all_scalars(self, where: MicroBatchSlice, device: torch.device) -> dict[str, Tensor]:
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
            scalars, self._dtype(), targets.device, self.rewrite,
        )  # fmt: skip


def _paired_loss(
    loss_fn: Loss,
    pairing: Pairing | None,
    logits: Tensor,
    targets: Tensor,
    scalars: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and its terms by name where it has several.

    With a pairing the first half of `logits` is one view of the examples, the second half the other. The terms are
    then `data_loss`, of the first view, and `consistency`, the distance before its weight.
    """
    if pairing is None:
        return loss_fn(logits, targets), {}
    weight = scalars[pairing.weight]
    if loss_fn.name == "cross_entropy":
        loss, data_loss, distance = cross_entropy_consistency(
            logits, targets, weight, pairing.distance, loss_fn.ignore_index, loss_fn.label_smoothing
        )
    else:
        one, two = logits.chunk(2)
        data_loss, distance = loss_fn(one, targets), (one - two).square().sum(-1).mean()
        loss = data_loss + weight * distance
    return loss, {"data_loss": data_loss.detach(), "consistency": distance.detach()}
