"""The open step of a program: what its micro-batches left, and the update that ends it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from trainc.compiler.execution.distributed import refuse_join, trains_apart
from trainc.compiler.execution.execution import Execution
from trainc.compiler.execution.replica_shares import Part, ReplicaShares
from trainc.compiler.execution.step_passes import StepPasses
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.adapted_model import silent_adapters
from trainc.compiler.model.undisturbed import ChangingBuffers
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.program.exchange_replicas import ExchangeReplicas
from trainc.compiler.program.own_loss import OwnLoss, OwnMicroBatch
from trainc.compiler.program.step_closure import StepClosure
from trainc.compiler.program.step_gradients import SurroundedSteps
from trainc.compiler.program.step_totals import (
    TermHistory,
    add_results,
    check_example_fractions,
    check_loss_weights,
    describe_unsound,
    free_gradients,
    is_of_scale,
    unscale_gradients,
    weigh_by_gradients,
)
from trainc.runtime.data.batch import Batch, count_tokens, one_of
from trainc.runtime.memory.failure import OutOfMemory, first_line, ran_out_of_memory
from trainc.runtime.memory.fitting import FittingSize
from trainc.runtime.run.interface import Meet, RunSettings
from trainc.runtime.run.meetings import MeetAgain
from trainc.runtime.soundness.own_loop import OwnLoop
from trainc.runtime.step.batches import BatchTransform, change_batch
from trainc.runtime.step.gradients import GradientNotFinite, ShortSteps
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OwnOptimizer
from trainc.runtime.step.record import Step
from trainc.runtime.step.replicas import Replicas

_FAILED_UPDATE = (
    "the update ran out of memory, after the passes of the step ({}). Passes of fewer samples do not help. An optimizer"
    " with less state does, and removing clauses that keep tensors of their own: `trainc plan` lists what they take."
    " Weights may have been changed in part, so go on from a checkpoint"
)


class OpenStep:
    """Opens the steps of one program, keeps the results of their micro-batches, and updates the model with them."""

    def __init__(
        self,
        execution: Execution,
        method: LoweredMethod,
        machine: StepMachine,
        settings: RunSettings,
        exchange: ExchangeReplicas | None = None,
        fitting: FittingSize | None = None,
    ) -> None:
        self.fitting = FittingSize(goes_on=False) if fitting is None else fitting
        """The number of examples in one pass that fits into memory."""
        self.notes: list[str] = []
        """What to say with the next step, of what was between them."""
        self.meet: Meet | None = None
        """Lets other replicas know of a step before its update; it raises StopRun where one of them ends the run."""
        self.meet_again: MeetAgain | None = None
        self.execution, self.method, self._exchange = execution, method, exchange
        self.machine, self.settings = machine, settings
        machine.equals = lambda: execution.replicas
        self.last: Step | None = None
        """The step that was updated or skipped last."""
        self.history = TermHistory()
        self._results: list[MicroBatchResult] = []
        self._buffers, self._between = ChangingBuffers.two(execution.module)
        """The buffers before the step, and after the micro-batches that have run: one of a loop by hand may fail."""
        self._loop = OwnLoop(execution.parameters, method.masks)
        self._opened: Step | None = None
        self._shares: ReplicaShares | None = None
        """What this replica has of the open step; None where it trains alone."""
        self._replicas: Replicas | None = None
        """The processes that average gradients with this one, as they are at the last of the micro-batches."""
        self._surrounded = SurroundedSteps(execution, machine)
        asking = [part.label for part in method.optimizers if part.asks]
        self._asking = asking[0] if asking else None
        """The optimizer that asks for loss and gradients several times in a step."""
        self.own_loss, self.own = OwnLoss(execution), cast("OwnMicroBatch | None", None)
        self.short_steps: ShortSteps | None = None
        """What lets a step of a framework have fewer micro-batches than their losses are divided by."""
        self.watched = False
        """Whether every pass of the model in train mode is a micro-batch that a framework runs."""
        own = (action for action in method.actions if isinstance(action, OwnOptimizer))
        self._own_optimizer = next(own, None)
        self._passes = StepPasses(execution, machine, self._forget_passes)
        self.id_readers = method.id_readers
        """The labels of the clauses that read sample ids: every step must then be given them."""

    def update(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
        """Update with the results of the micro-batches; see `Program.update`."""
        if self.own is not None:
            raise RuntimeError(
                "the loss of a `micro_batch` had no backward pass: call `program.backward(loss)` before `update`"
            )
        self._loop.check_update(len(self._results))
        whole = 1.0 if self.short_steps is None else self.short_steps.open(len(self._results))
        alone = self._replicas is None
        weigh_by_gradients(self._results, scaler, self.execution.statistics, whole, alone=alone)
        step = self.machine.current
        assert step is not None
        try:
            step.notes, self.notes = [*self.notes, *step.notes], []
            self._finish(step, scaler)
        except BaseException as error:
            self._forget_passes(step)
            self.machine.discard_step()
            self._shares = None
            if ran_out_of_memory(error) and not isinstance(error, OutOfMemory):
                raise OutOfMemory(_FAILED_UPDATE.format(first_line(error))) from error
            raise
        torch.clear_autocast_cache()  # its copies of the weights are from before the update
        return {"loss": step.loss, "batch": float(step.samples), **step.metrics}

    def discard_step(self) -> None:
        """Forget the open step; see `Program.discard_step`."""
        self.machine.check_outside("discard_step")
        if (step := self.machine.current) is not None:
            self._forget_passes(step)
            self.machine.discard_step()
        self._shares = None
        free_gradients(self.method)

    def begin(self) -> Step:
        """Open the step unless it is open, before the first with what replicas that train already hand over."""
        step, exchange = self.machine.begin(), self._exchange
        return step if exchange is None else exchange.opened(step, self.machine, self.notes)

    def _open(self, own: Part) -> Step:
        """Open the step unless it is open; where the spec names no data, its batch size follows from its examples.

        `own` is what this process has of the step, as far as its first micro-batch tells.
        """
        first = self.machine.current is None
        if self.machine.ended is None and (first or self.machine.current is not self._opened):
            if first and self._own_optimizer is None:
                self._loop.refuse_gradients()
            elif first and self._own_optimizer is not None:
                self._own_optimizer.check_freed()
            if self.last is None:
                self.execution.find_wrappers()
                for companion in self.method.evaluated_with.values():
                    companion.sources()  # raises for shards, before anything has changed
            if self.execution.follow_model(self.machine.actions, first_step=self.last is None):
                self._buffers, self._between = ChangingBuffers.two(self.execution.module)
        self._replicas = replicas = self.execution.replicas
        if replicas is not None:
            refuse_join(self.execution.wrappers)
            self._exchange_shares(own, replicas)
        samples = own.examples if self._shares is None else self._shares.samples
        if first and not self.machine.micro_size and not math.isnan(samples):
            self.machine.batch_size = round(samples)
        step = self.begin()
        if opened := step is not self._opened:
            self._opened = step
            step.may_be_unsound = self.settings.on_nan == "continue"
            self._buffers.keep()
        self.execution.masked.begin(replicas, self.execution.wrappers)
        step.replicas = step.replicas or replicas
        if self._exchange is not None and step.exchange_group is None:
            step.exchange_group = self.execution.exchange_group = self._exchange.join()
        peers = step.exchange_group or step.replicas
        if opened and self.last is None and (apart := trains_apart(peers)) is not None:
            step.notes.append(apart)
        return step

    def _exchange_shares(self, own: Part, replicas: Replicas) -> None:
        """Let each replica know what the others have of the step, before the first of its passes.

        A first micro-batch that is run again after an error has its share: the other replicas do not repeat it.
        """
        shares = self._shares
        if shares is None or not (self._results or shares.is_of(own)):
            self._shares = ReplicaShares.exchanged(own, replicas)

    def _share_again(self, own: Part) -> None:
        """Do so once more where clauses may have changed what counts."""
        if self._replicas is not None:
            self._shares = ReplicaShares.exchanged(own, self._replicas)

    def _in_step(self, where: MicroBatchSlice, *, shared: bool = True) -> MicroBatchSlice:
        """Return the place of a micro-batch in the step of all replicas, from that in this process.

        A framework's is not `shared`: it differentiates a loss that it divides itself.
        """
        exchange = self.execution.exchange_group
        if self._shares is not None and shared:
            where = self._shares.apply(where, sharded=not self.execution.whole)
            return where if exchange is None else replace(where, stream=exchange.rank)
        peers = exchange or self._replicas
        return where if peers is None else replace(where, stream=peers.process)

    def _changed(
        self, step: Step, micro_batches: list[Batch], sample_ids: Sequence[Tensor | None]
    ) -> list[Batch]:
        """Return the next micro-batches of the step as clauses change them; evaluation mode changes none."""
        transforms, first = self.machine.batch_transforms, step.samples
        if not (transforms and self.execution.module.training):
            return micro_batches
        changed, seed = [], self.execution.seed
        self._tell_classes(transforms, step, micro_batches[0])
        for batch, ids in zip(micro_batches, sample_ids, strict=True):
            changed.append(change_batch(transforms, batch, step, seed, first, ids))
            first += len(one_of(batch[1]))
        return changed

    def _tell_classes(self, transforms: Sequence[BatchTransform], step: Step, batch: Batch) -> None:
        """Let transforms that mix classes know how many there are."""
        for one in transforms:
            asks = one.mixes_classes and one.classes is None and one.is_due(step)
            if asks and self.execution.loss_fn.of_classes:
                one.classes = self.execution.count_classes(batch)

    def _calibrate(self, step: Step, batch: Batch, where: MicroBatchSlice) -> None:
        """Measure all layers on the step's first micro-batch when a clause asks for it now."""
        if self._results or not self.execution.module.training:
            return
        for part in self.method.calibrations:
            if part.gate.fires(self.machine.clock):
                found = self.execution.calibrate(batch, where, part.examples)
                step.calibrations[part.label] = found

    def _keep(self, step: Step, batch: Batch, result: MicroBatchResult) -> None:
        """Keep the results of a micro-batch that ran."""
        step.notes.extend(result.notes)
        self._count(step, batch[1])
        result.targets = batch[1]
        self._results.append(result)

    def _count(self, step: Step, targets: Any) -> None:
        step.samples += len(one_of(targets))
        step.tokens += count_tokens(targets)

    def _finish(self, step: Step, scaler: torch.amp.GradScaler | None) -> None:
        """Update with the results of the micro-batches, or skip the step."""
        if scaler is not None:
            unscale_gradients(scaler, self.method)
        if self.short_steps is not None:
            self.short_steps.enlarge()
        self._collect(step, 1.0 if scaler is None else scaler.get_scale())
        self.execution.sites.deactivate()  # what actions run is no pass of the step
        if self.last is None:
            step.notes.extend(silent_adapters(self.execution.module, self.method.masks))
        self.last = step
        overflowed = scaler is not None and not math.isfinite(step.metrics["gradient_norm"])
        goes_on = not overflowed and (step.unsound is None or step.may_be_unsound)
        if self.meet is not None:
            ends = None if goes_on else self.history.ending(step, scaler, self.settings)
            self.meet(step, ends, not goes_on)
        if goes_on:
            try:
                self.machine.finish()
            except GradientNotFinite as error:
                found = describe_unsound(step, self.execution.losses, self.method)
                step.unsound = str(error) or found
                goes_on = False
        if not goes_on:
            if self.meet_again is not None:
                ends = self.history.ending(step, scaler, self.settings)
                self.meet_again.tell(step, ends, skips=True)
            self._skip_step(step, scaler)
        elif step.unsound is None:
            self.history.skipped.in_row = 0
        # They hold the micro-batches and the gradients, which are free now.
        step.closure = step.gradients = None
        self.execution.sites.deactivate()

    def _collect(self, step: Step, scale: float) -> None:
        """Add the results of the micro-batches, whose losses a GradScaler multiplied by `scale`, to the step."""
        statistics, replicas = self.execution.statistics, self._replicas
        if isinstance(step.closure, StepClosure):
            step.closure.keep(self._results)
        for mask in self.method.masks.values():
            mask.gather()
        self.execution.masked.average(replicas)
        gradients = self.method.model_gradient.measure()
        weight, factors = add_results(
            step,
            self._results,
            gradients,
            statistics,
            replicas,
            self._loop.factors(),
            self.method.model_gradient.name_of,
        )
        norm = gradients.total if gradients.numbers else None
        self._loop.check_gradients(norm, factors, scale)
        terms = {name: step.metrics[name] for name in self._results[0].terms}
        self.history.record({"loss": step.loss, **terms})
        check_loss_weights(step, weight)
        if replicas is None and self.execution.rewrite.of_examples:
            check_example_fractions(self._results)
        if step.contributions and replicas is None:
            statistics.scaling.check()
        step.unsound = describe_unsound(step, self.execution.losses, self.method, self._results)
        self._results.clear()
        self._shares = None
        self._loop.clear()
        statistics.close()

    def _forget_passes(self, step: Step) -> None:
        """Leave nothing of the passes so far, which an error ended: the step can be run again, on any batch.

        It stays open: the rules and rates of this step have been decided.
        """
        free_gradients(self.method)
        self._buffers.restore()
        self._results.clear()
        self._loop.clear()
        self.own = None
        self.execution.statistics.close()
        self.execution.sites.deactivate()
        self._forget_observations()
        step.calibrations.clear()
        step.samples = step.tokens = 0

    def _forget_observations(self) -> None:
        for observer in self.method.rewrite.observers:
            observer.forget()

    def _skip_step(self, step: Step, scaler: torch.amp.GradScaler | None) -> None:
        """Leave out a step that is not sound; raises NonFiniteLoss or NonFiniteGradient where that ends the run."""
        free_gradients(self.method)
        self._forget_observations()
        if is_of_scale(step, scaler):
            self.history.skipped.overflowed += 1
            step.unsound = None
        else:
            self._buffers.restore()
            self.history.skipped.add(step, self.settings)
        self.machine.skip_step(step)
        step.metrics["skipped"] = 1.0
