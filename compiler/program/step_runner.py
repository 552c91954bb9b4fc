"""Run the steps of a program: its micro-batches one by one, then the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trainc.compiler.execution.replica_shares import Part
from trainc.compiler.method.loss import require_loss
from trainc.compiler.model.batch_statistics import notes_on_division
from trainc.compiler.model.undisturbed import random_states
from trainc.compiler.per_example.micro_batch import (
    MicroBatchResult,
    MicroBatchSlice,
    require_same_count,
    slice_of_step,
    slices,
)
from trainc.compiler.program.open_step import OpenStep
from trainc.compiler.program.own_loss import OwnMicroBatch, Read, check_loss
from trainc.compiler.program.step_closure import StepClosure, needs_whole_step
from trainc.compiler.program.step_totals import require_train_mode, usable_scaler, without_part
from trainc.runtime.data.batch import Batch, GivenBatch, one_of, split_batch
from trainc.runtime.data.sample_ids import SampleIds, ids_of, split_batches
from trainc.runtime.step.record import Step


class StepRunner(OpenStep):
    """Runs micro-batches of one program and updates its model with their results."""

    def run(
        self,
        batch: GivenBatch,
        loss_weight: float = 1.0,
        example_fraction: float | None = None,
        sample_ids: Tensor | None = None,
        *,
        as_graph: bool,
    ) -> Tensor:
        """Run one micro-batch and return its loss; see `Program.loss`. As a graph its backward pass is done, too."""
        self._require_step()
        self._require_own_loop("loss")
        self.refuse_inside_block("graph" if as_graph else "loss")
        where = slice_of_step(loss_weight, example_fraction)
        loss_weight, fraction = where.loss_weight, where.example_fraction
        if not as_graph:
            self._loop.require_gradients("loss")
            self._require_train_mode()
        versions = self._loop.before_loss()
        require_loss(self.execution.loss_fn)
        checked = self.execution.losses.batch(batch)
        self.execution.settle([checked], divided=loss_weight != 1, together=not self._results)
        self._check_values([checked])
        (ids,) = ids_of(sample_ids, [checked], self.id_readers, listed=False)
        examples, losses = len(one_of(checked[1])), self.execution.losses
        counted = partial(losses.counts, checked[1])
        step = self._open(Part.of_micro_batch(examples, counted, loss_weight, fraction))
        if self._shares is not None and self._results:
            self._shares.check(counted(), loss_weight)
        changed = self._changed(step, [checked], [ids])[0]
        if loss_weight != 1.0 and changed is not checked:
            names = [action.name for action in self.machine.batch_transforms]
            require_same_count(losses, names, checked[1], changed[1])
        if self.machine.batch_transforms and not self._results:
            counted = partial(losses.counts, changed[1])
            self._share_again(Part.of_micro_batch(examples, counted, loss_weight, fraction))
        checked = self.execution.prepare(changed)
        where = MicroBatchSlice(loss_weight, fraction, step.samples, ids)
        where = self._in_step(where.of_batch(checked, losses))
        self._calibrate(step, checked, where)
        run = self.execution.run_graph if as_graph else self.execution.run_modules
        with self._undone_if_failed(step), self.execution.losses.naming_classes([checked]):
            loss, result = run(checked, where)
        if not where.loss_weight and not self.execution.runs_without_targets(where):
            loss = without_part(loss, result, weighed=self._shares is not None)
        self._keep(step, checked, result)
        if not as_graph:
            self._loop.watch(loss, where.loss_weight, versions)
        return loss

    def step(
        self,
        batch: GivenBatch | Sequence[GivenBatch],
        scaler: torch.amp.GradScaler | None = None,
        sample_ids: SampleIds | None = None,
    ) -> dict[str, float]:
        """Run one step on a batch or a list of its micro-batches; see `Program.step`."""
        self._require_own_loop("step")
        require_loss(self.execution.loss_fn)
        if scaler is not None:
            scaler = usable_scaler(scaler, self._asking, self.execution.executor)
        self.refuse_inside_block("step")
        self._loop.require_whole_step(len(self._results))
        self._require_train_mode()
        if isinstance(batch, list):
            if not batch:
                raise ValueError("a step needs at least one micro-batch, and the list is empty")
            micro_batches = [self.execution.losses.batch(one) for one in batch]
        else:
            whole = self.execution.losses.batch(batch)
            micro_batches = split_batch(whole, self.machine.micro_size)
        self.execution.settle(micro_batches, divided=len(micro_batches) > 1, together=True)
        self._check_values(micro_batches)
        ids = ids_of(sample_ids, micro_batches, self.id_readers, listed=isinstance(batch, list))
        rewind = random_states(self.execution.module) if self.fitting.goes_on else None

        def undo() -> None:
            self.discard_step()
            if rewind is not None:
                rewind()

        step = self.fitting.run(
            partial(self._attempt, micro_batches, ids, scaler),
            undo,
            max(len(one_of(targets)) for _, targets in micro_batches),
            alone=self.execution.replicas is None,
        )
        if (news := self.fitting.news(step.clock.steps + 1)) is not None:
            step.notes += [news, *notes_on_division(self.execution.module)]
        return self.update(scaler)

    def _attempt(
        self,
        micro_batches: list[Batch],
        ids: Sequence[Tensor | None],
        scaler: torch.amp.GradScaler | None,
        size: int | None,
    ) -> Step:
        """Open the step and run its passes, of at most `size` examples each where it is given."""
        losses, prepare = self.execution.losses, self.execution.prepare
        step = self._open(Part.of_step(micro_batches, losses))
        if self.machine.batch_transforms:
            micro_batches = self._changed(step, micro_batches, ids)
            self._share_again(Part.of_step(micro_batches, losses))
        if size is not None:
            micro_batches, ids = split_batches(micro_batches, ids, size)
            self.execution.settle(micro_batches, divided=len(micro_batches) > 1)
        places = map(self._in_step, slices(micro_batches, losses, step.samples, ids))
        to_run = self._to_run(step, list(zip(micro_batches, places, strict=True)))
        try:
            with losses.naming_classes(micro_batches):
                self._pass_counted(step, [(prepare(one), at) for one, at in to_run], scaler)
        except BaseException:
            self._forget_passes(step)
            raise
        return step

    # with a loss of the user's own

    def refuse_inside_block(self, called: str) -> None:
        """Raise RuntimeError where a `micro_batch` is open, or its loss had no backward pass."""
        if self.own is None or (called == "evaluate" and self.own.complete):
            return
        instead = "before or after" if called == "evaluate" else "after"
        raise RuntimeError(
            f"`program.{called}` was called inside of `program.micro_batch`, or before its `program.backward(loss)`:"
            f" call it {instead} these"
        )

    @contextmanager
    def micro_batch(self, own: OwnMicroBatch) -> Iterator[None]:
        """Let the passes inside this block be those of a micro-batch; see `Program.micro_batch`."""
        self._require_step("micro_batch")
        if self.own is not None:
            raise RuntimeError(
                "`micro_batch` is open, or its loss had no backward pass yet: call `program.backward(loss)` after its"
                " block, or `program.discard_step()` to forget the step"
            )
        self._require_train_mode()
        self.own_loss.check(self.machine)
        own.versions = self._loop.before_loss()
        step = self._open(own.part)
        if self._shares is not None and self._results and not own.framework:
            self._shares.check(own.counted(), own.where.loss_weight)
        where = replace(own.where, first_example=step.samples)
        own.where = self._in_step(where, shared=not own.framework)
        with self._undone_if_failed(step), self.own_loss.block(own):
            self.own = own
            try:
                yield
            except BaseException:
                self.own = None
                raise

    def backward(
        self, loss: Tensor, read: Read, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Run the backward pass of the micro-batch that `micro_batch` held; see `Program.backward`."""
        own = self._complete(
            "`backward` takes the loss of a micro-batch, after its block: write"
            " `with program.micro_batch(examples=len(x)): loss = ...`, then `program.backward(loss)`"
        )
        total, result = self._total(own, loss, read)
        (total if scaler is None else scaler.scale(total)).backward()
        self._keep_own(own, result, read)
        return total.detach()

    def check_framework(self) -> None:
        """Raise SiteError or ValueError where a clause needs what a framework that runs the passes cannot give."""
        self._require_step("as_optimizer")
        self.own_loss.check(self.machine, "with `as_optimizer` a framework")
        if self.id_readers:
            names = ", ".join(f"`{label}`" for label in self.id_readers)
            raise ValueError(
                f"{names} reads which samples a batch holds, and `as_optimizer` has no way to say it: call"
                " `program.step(batch, sample_ids=ids)` in a loop of your own"
            )

    def to_differentiate(self, loss: Tensor, read: Read) -> Tensor:
        """Return the loss of the micro-batch that `micro_batch` held for a backward pass that a framework runs."""
        own = self._complete(
            "`optimizer.loss` takes the loss of a forward pass that the model ran in train mode, once for each pass"
        )
        total, result = self._total(own, loss, read, by_framework=True)
        total.register_hook(partial(setattr, result, "loss_scale"))
        # Another micro-batch may run before this one's backward pass, in which checkpoints run layers again.
        total.register_hook(partial(self.execution.sites.restore, self.execution.sites.states()))
        self._keep_own(own, result, read)
        return total

    def _complete(self, otherwise: str) -> OwnMicroBatch:
        """Return the micro-batch whose block has ended and whose loss is awaited."""
        if self.own is None or self.machine.current is None or not self.own.complete:
            raise RuntimeError(otherwise)
        return self.own

    def _total(
        self, own: OwnMicroBatch, loss: Tensor, read: Read, *, by_framework: bool = False
    ) -> tuple[Tensor, MicroBatchResult]:
        """Return what to differentiate, and the results of the micro-batch; its backward pass is counted."""
        self._loop.before_loss()
        total, result = self.own_loss.add_terms(own, check_loss(loss), read)
        if not own.where.loss_weight and not self.execution.runs_without_targets(own.where):
            total = without_part(total, result, weighed=self._shares is not None)
        result.by_framework = by_framework
        self._loop.watch(total, own.where.loss_weight, own.versions, multiplied=by_framework)
        return total, result

    def _keep_own(self, own: OwnMicroBatch, result: MicroBatchResult, read: Read) -> None:
        step = self.machine.begin()
        self.own = None
        step.samples, step.tokens = step.samples + own.examples, step.tokens + own.tokens
        step.notes.extend(result.notes)
        result.targets = read.targets
        self._results.append(result)

    # inside

    def _to_run(
        self, step: Step, placed: Sequence[tuple[Batch, MicroBatchSlice]]
    ) -> Sequence[tuple[Batch, MicroBatchSlice]]:
        """Return the micro-batches that have a part in the step, and count the others.

        Replicas wait for each other's gradients, and those that shard weights for each other's passes: where this one
        has nothing to give, a pass without a part is run.
        """
        runs = [bool(w.loss_weight) or self.execution.runs_without_targets(w) for _, w in placed]
        if self._shares is not None:
            runs = [True] * len(runs) if self.execution.meets_in_passes else runs
            runs[-1] |= not any(runs)
        for (one, _), is_run in zip(placed, runs, strict=True):
            if not is_run:
                self._count(step, one[1])
        return [one for one, is_run in zip(placed, runs, strict=True) if is_run]

    def _check_values(self, batches: Sequence[Batch]) -> None:
        """Check the values of targets, on other devices than the CPU in the first step only: they must be read."""
        for _, targets in batches:
            if self.last is None or one_of(targets).is_cpu:
                self.execution.losses.check_values(targets)

    def _require_train_mode(self) -> None:
        """Raise SiteError in eval mode where clauses act in train mode only."""
        if not self.execution.module.training:
            changing = [action.name for action in self.machine.batch_transforms]
            require_train_mode(self.execution.rewrite, changing)

    @contextmanager
    def _undone_if_failed(self, step: Step) -> Iterator[None]:
        """Undo what a forward pass in this block changed where it fails: the micro-batch can be run again."""
        if self._results:
            self._between.keep()
        try:
            yield
        except BaseException:
            if self._results:
                self._between.restore()
            else:
                self._forget_passes(step)
            raise

    def _require_own_loop(self, called: str) -> None:
        if self.watched:
            raise RuntimeError(
                f"`program.{called}` was called after `program.as_optimizer()`, which takes each pass of the model in"
                " train mode for a micro-batch: call the model, `backward()` and `step()` of the optimizer instead, or"
                " compile another program"
            )

    def _require_step(self, called: str = "loss") -> None:
        """Raise ValueError where a clause needs all micro-batches of a step before the first of them is run."""
        if self.machine.around:
            why = f"{self._surrounded.names} acts before the first of a step's micro-batches and"
        elif self._asking is not None:
            why = f"`{self._asking}` asks for the loss and gradients of a step several times and"
        else:
            return
        raise ValueError(needs_whole_step(why, called))

    def _pass_counted(
        self,
        step: Step,
        counted: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Run all micro-batches that have a part in the step, inside what clauses put around their passes."""
        if self._asking is not None and counted:
            step.closure = StepClosure(self.execution, self._asking, counted)
        if self.machine.around and counted:
            passes = 0 if self._shares is None else self._shares.passes
            with self._surrounded.surround(step, counted, scaler, passes) as parts:
                self._pass_all(step, parts, scaler)
        else:
            self._pass_all(step, counted, scaler)

    def _pass_all(
        self,
        step: Step,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Run forward and backward passes of all micro-batches."""
        alone = len(micro_batches) == 1
        for i, (one, where) in enumerate(micro_batches):
            if self.method.calibrations:
                self._calibrate(step, one, where)
            last = i == len(micro_batches) - 1  # in its backward pass replicas average gradients
            with nullcontext() if last else self.execution.no_sync():
                self._keep(step, one, self._passes.run(step, one, where, scaler, alone))
        if self._shares is not None and self.execution.meets_in_passes:
            # The others gather weights and exchange gradients in as many passes as they have.
            for _ in range(self._shares.passes - len(micro_batches)):
                self.execution.run_without_part(micro_batches[-1][0])
