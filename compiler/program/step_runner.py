"""Run the steps of a program: its micro-batches one by one, then the update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice, slices
from trainc.compiler.program.distributed import first_shard, rebind_parameters
from trainc.compiler.program.exchange_replicas import ExchangeReplicas
from trainc.compiler.program.execution import Execution
from trainc.compiler.program.step_gradients import StepGradients
from trainc.compiler.program.step_totals import add_results, check_loss_weights
from trainc.runtime.data.batch import Batch, check_batch, count_tokens, split_batch
from trainc.runtime.run.interface import NonFiniteLoss, RunSettings
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.step.record import Step


class StepRunner:
    """Runs micro-batches of one program and updates its model with their results."""

    def __init__(
        self,
        execution: Execution,
        method: LoweredMethod,
        machine: StepMachine,
        settings: RunSettings,
        exchange: ExchangeReplicas | None = None,
    ) -> None:
        self.execution, self.method, self._exchange = execution, method, exchange
        self.machine, self.settings = machine, settings
        self.last: Step | None = None
        """The step that was updated or skipped last."""
        self.first_terms: dict[str, float] = {}
        """The loss and its terms at the first step, for the summary."""
        self._results: list[MicroBatchResult] = []
        self._missed_noted = False

    def run(
        self,
        batch: Batch,
        loss_weight: float = 1.0,
        example_fraction: float | None = None,
        *,
        as_graph: bool,
    ) -> Tensor:
        """Run one micro-batch and return its loss; see `Program.loss`. As a graph its backward pass is done, too."""
        self._require_step()
        checked = check_batch(batch)
        fraction = loss_weight if example_fraction is None else example_fraction
        step = self._open([checked], fraction)
        where = MicroBatchSlice(loss_weight, fraction, step.samples)
        self._calibrate(step, checked)
        run = self.execution.run_graph if as_graph else self.execution.run_modules
        loss, result = run(checked, where)
        self._keep(step, checked, result)
        return loss

    def step(
        self, batch: Batch | Sequence[Batch], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]:
        """Run one step on a batch or a list of its micro-batches; see `Program.step`."""
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        if scaler is not None and self.execution.executor == "graph":
            raise ValueError(
                "a graph computes gradients of the loss as it is, which a GradScaler cannot scale: compile with"
                ' `executor="module"`, or train in bfloat16, which needs no scaler'
            )
        if isinstance(batch, list):
            if not batch:
                raise ValueError("a step needs at least one micro-batch, and the list is empty")
            micro_batches = [check_batch(one) for one in batch]
        else:
            micro_batches = split_batch(check_batch(batch), self.machine.micro_size)
        step = self._open(micro_batches)
        places = slices(micro_batches, self.execution.loss_fn, step.samples)
        counted = []
        for one, where in zip(micro_batches, places, strict=True):
            if where.loss_weight:
                counted.append((one, where))
            else:
                self._count(step, one[1])
        around = self.machine.around and counted
        try:
            with (
                self._surrounded(step, counted, scaler) if around else nullcontext(counted) as parts
            ):
                self._pass_all(step, parts, scaler)
        except BaseException:
            self._forget_passes(step)
            raise
        return self.update(scaler)

    def update(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
        """Update with the results of the micro-batches; see `Program.update`."""
        step = self.machine.current
        if step is None or not self._results:
            raise RuntimeError(
                "nothing to update: call `program.loss(batch)` and its `backward()` first"
            )
        try:
            self._finish(step, scaler)
        except BaseException:
            self._forget_passes(step)
            self.machine.discard_step()
            raise
        return {"loss": step.loss, "batch": float(step.samples), **step.metrics}

    def reset(self) -> None:
        """Forget the open step."""
        self._results.clear()
        self.execution.statistics.close()
        self.machine.discard_step()

    # inside

    def _require_step(self) -> None:
        """Raise ValueError where a clause needs all micro-batches of a step before the first of them is run."""
        if self.machine.around:
            raise ValueError(
                f"{self._around} acts before the first of a step's micro-batches and needs all of them, and `loss` gets"
                " one: in place of `loss`, `backward` and `update` call `program.step(batch)`, or"
                " `program.step([first, second, ...])` with all micro-batches"
            )

    @property
    def _around(self) -> str:
        """Return the names of what surrounds the passes of a step, for messages."""
        return ", ".join(f"`{action.name}`" for action in self.machine.around)

    @contextmanager
    def _surrounded(
        self,
        step: Step,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> Iterator[Sequence[tuple[Batch, MicroBatchSlice]]]:
        """Surround the passes of this step, and yield the micro-batches that these run.

        Raises SiteError for sharded parameters.
        """
        if (shard := first_shard(self.execution.parameters)) is not None:
            raise SiteError(
                f"`{shard}` is sharded over processes (FSDP2), and the gradients that {self._around} needs before the"
                " step's passes are not averaged there: use DistributedDataParallel, or remove the clause"
            )
        gradients = StepGradients(self.execution, micro_batches, scaler)
        try:
            with self.machine.surround(step, gradients):
                torch.clear_autocast_cache()  # of the weights' values before they were changed
                yield gradients.micro_batches
                if not self._missed_noted and (missed := gradients.missed()):
                    self._missed_noted = True
                    step.notes.append(
                        f"`{missed[0]}` has a gradient in this step, but had none when {self._around} asked before it:"
                        " another part of the model ran, or an autograd.Function of its own hides the parameter, as"
                        " checkpoints other than torch's do"
                    )
        finally:
            torch.clear_autocast_cache()

    def _pass_all(
        self,
        step: Step,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Run forward and backward passes of all micro-batches."""
        for i, (one, where) in enumerate(micro_batches):
            self._calibrate(step, one)
            with self._no_sync(unless=i == len(micro_batches) - 1):
                self._keep(step, one, self.execution.run(one, where, scaler))

    def _open(self, micro_batches: Sequence[Batch], example_fraction: float = 1.0) -> Step:
        """Open the step unless it is open; where the spec names no data, its batch size is that of the micro-batches.

        `example_fraction` is the fraction of the step's examples that is in them.
        """
        if self.machine.current is None:
            if self.last is None:
                rebind_parameters(
                    self.execution.module, self.execution.parameters, self.machine.actions
                )
            if not self.machine.micro_size and example_fraction > 0:
                own = sum(len(targets) for _, targets in micro_batches) / example_fraction
                replicas = self.execution.replicas
                self.machine.batch_size = round(own if replicas is None else replicas.total(own))
        step = self.machine.begin()
        if step.replicas is None:
            if self._exchange is not None:
                self.execution.exchange_group = self._exchange.join()
            step.replicas = self.execution.peers
        return step

    def _no_sync(self, unless: bool) -> AbstractContextManager[Any]:
        """Keep replicas from averaging gradients, `unless` this is the last backward pass of the step."""
        no_sync = getattr(self.execution.forward, "no_sync", None)
        return nullcontext() if unless or no_sync is None else no_sync()

    def _keep(self, step: Step, batch: Batch, result: MicroBatchResult) -> None:
        """Keep the results of a micro-batch that ran."""
        step.notes.extend(result.notes)
        self._count(step, batch[1])
        self._results.append(result)

    def _calibrate(self, step: Step, batch: Batch) -> None:
        """Measure all layers on the step's first micro-batch when a clause asks for it now."""
        if self._results or not self.execution.module.training:
            return
        for part in self.method.calibrations:
            if part.gate.fires(self.machine.clock):
                step.calibrations[part.label] = self.execution.calibrate(batch, part.examples)

    def _count(self, step: Step, targets: Tensor) -> None:
        step.samples += targets.shape[0]
        step.tokens += count_tokens(targets)

    def _finish(self, step: Step, scaler: torch.amp.GradScaler | None) -> None:
        """Update with the results of the micro-batches, or skip the step."""
        named = self.execution.parameters
        overflowed = scaler is not None and unscale_gradients(scaler, self.method, named)
        self._collect(step)
        self.last = step
        refused = not math.isfinite(step.loss) and self.settings.on_nan != "continue"
        if refused or overflowed:
            self._skip_step(step)
        else:
            self.machine.finish()
        self.execution.sites.deactivate()

    def _collect(self, step: Step) -> None:
        """Add the results of the micro-batches to the step."""
        statistics, replicas = self.execution.statistics, self.execution.replicas
        add_results(step, self._results, statistics, replicas)
        self.first_terms.setdefault("loss", step.loss)
        for name in self._results[0].terms:
            self.first_terms.setdefault(name, step.metrics[name])
        if step.contributions:
            check_loss_weights(step)
            if replicas is None:
                statistics.scaling.check()
        self._results.clear()
        statistics.close()

    def _forget_passes(self, step: Step) -> None:
        """Leave nothing of the passes so far, which an error ended: the step can be run again, on any batch.

        It stays open: the rules and rates of this step have been decided.
        """
        self._free_gradients()
        self._results.clear()
        self.execution.statistics.close()
        self.execution.sites.deactivate()
        step.calibrations.clear()
        step.samples = step.tokens = 0

    def _free_gradients(self) -> None:
        """Free what the optimizers would have read."""
        for action in self.method.actions:
            if isinstance(action, OptimizerStep):
                action.zero_grad()
        for mask in self.method.masks.values():
            mask.discard()

    def _skip_step(self, step: Step) -> None:
        """Skip the update of a non-finite or overflowed step; raises NonFiniteLoss where `on_nan` stops the run."""
        self._free_gradients()
        self.machine.discard_step()
        if not math.isfinite(step.loss) and self.settings.on_nan == "stop":
            steps = self.machine.clock.steps
            raise NonFiniteLoss(
                f"the loss is {step.loss} at step {steps}: the run stops with the weights from before this step"
            )
        self.machine.exchange(step)
        self.machine.clock.advance(samples=step.samples, tokens=step.tokens, seconds=0.0)
        step.metrics["skipped"] = 1.0


def unscale_gradients(
    scaler: torch.amp.GradScaler, method: LoweredMethod, parameters: Mapping[str, nn.Parameter]
) -> bool:
    """Divide gradients by what the losses were multiplied by, and return whether one of them overflowed.

    Raises ValueError with a mask that keeps gradients elsewhere or with sharded parameters, where a GradScaler cannot
    do its work.
    """
    if separate := [name for name, mask in method.masks.items() if mask.separate]:
        names = ", ".join(f"`{name}`" for name in separate)
        raise ValueError(
            f"a GradScaler cannot find the gradients of {names}, which a `mask` clause keeps elsewhere: train in"
            " bfloat16, which needs no scaler, or remove the mask"
        )
    if first_shard(parameters) is not None:
        raise ValueError(
            "with sharded parameters (FSDP2), replicas may disagree on whether a gradient overflowed: train in"
            " bfloat16, which needs no scaler"
        )
    for action in method.actions:
        if isinstance(action, OptimizerStep):
            scaler.unscale_(action.torch)
    found = [p.grad for p in parameters.values() if p.grad is not None]
    return not all(torch.stack([gradient.isfinite().all() for gradient in found]).tolist())
