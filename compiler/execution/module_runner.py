"""Run one micro-batch by the bound modules, or one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainc.compiler.execution.armed_model import ArmedModel
from trainc.compiler.execution.compiled import state_of
from trainc.compiler.execution.distributed import refuse_shards
from trainc.compiler.execution.scalars import read_by_terms
from trainc.compiler.graph.step_graph import no_autocast
from trainc.compiler.graph.trial import TrialResult
from trainc.compiler.layers.random_layers import SharedDropout
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.term import Forward
from trainc.compiler.method.total_loss import loss_without_targets, nothing_of, total_loss
from trainc.compiler.model.eager import eager_operations
from trainc.compiler.model.undisturbed import (
    ChangingBuffers,
    gradients_of,
    in_mode,
    keep_state,
    random_states,
    undisturbed,
)
from trainc.compiler.per_example.brute_force import measure_one_by_one
from trainc.compiler.per_example.micro_batch import (
    MicroBatchResult,
    MicroBatchSlice,
    slices_of_examples,
)
from trainc.compiler.per_example.preconditions import (
    check_changed_weights,
    check_preconditions,
    check_views,
)
from trainc.compiler.per_example.residual_branches import check_branches
from trainc.compiler.replay.replayed import OWN_LOOP
from trainc.runtime.data.batch import Batch, copy_inputs, one_of, split_batch
from trainc.runtime.step.record import CalibrationSample
from trainc.runtime.step.replicas import Replicas


class ModuleRunner(ArmedModel):
    """Runs micro-batches of one program by the modules of its model."""

    def prepare(self, batch: Batch) -> Batch:
        """Return a micro-batch with what its losses read of it besides output and targets, before its first pass."""
        with self.autocast(), self.losses.naming_classes([batch]):
            return self.losses.prepare(batch)

    def run_unchanged(self, batch: Batch) -> MicroBatchResult | None:
        """Run forward and backward of a whole step where no clause changes or measures them; None where one does.

        It is what `run_modules` does without looking for what is not there, which a small model would feel.
        """
        if not self._unchanged:
            return None
        (part,) = self.losses.parts
        with self.autocast():
            read = self.losses.run(self.forward, batch)
            loss = part.loss(read.of[part.label], part.targets(batch[1]))
        loss.backward()
        value = loss.detach()
        return MicroBatchResult(None, value, {}, total=value)

    def run_modules(
        self, batch: Batch, where: MicroBatchSlice, why: str = OWN_LOOP
    ) -> tuple[Tensor, MicroBatchResult]:
        """Return the loss to differentiate, and results that are complete after its backward pass; `why` by modules."""
        whose = "a micro-batch's or replica's own"
        instead = "measure gradients of examples, which needs no such gradient"
        refuse_shards(whose, self.statistics.batch_gradients, self.parameters, instead)
        self._check_preconditions(batch)
        scalars, rewrite = self._scalars(batch, where), self.rewrite
        if rewrite:
            self._activate(batch, scalars)
        unchecked = self.module.training and not self.covered
        counting: AbstractContextManager[dict[str, int]]
        counting = self.sites.count_calls() if unchecked else nullcontext({})
        with counting as counts:
            total, loss, terms, forward = self._run_forward(
                self.forward, batch, where.loss_weight, scalars
            )
        self.sites.check_coverage(counts)
        if rewrite and total.requires_grad:
            # Another micro-batch may run before this one's backward pass, in which checkpoints run layers again.
            total.register_hook(partial(self.sites.restore, self.sites.states()))
        self.observe(forward, where)
        self.covered |= unchecked
        result = self._result(batch, where, loss, terms)
        result.notes = () if self.watched else self.drawn_apart
        self.watched |= self._shares
        result.notes += self.news(why)
        if self.statistics.wanted:
            result.probes = self.sites.probes()
            result.synchronised = self.exchanges_now
            self.statistics.watch(result, total)
        return total, result

    @property
    def _shares(self) -> bool:
        return self.rewrite.share_dropout and self.module.training

    def _dropout(self, batch: Batch) -> SharedDropout | None:
        """Return what shares the masks of functions between views; compiled code is only watched, and once."""
        if not self._shares or (self.watched and self.compiler is not None):
            return None
        return SharedDropout(len(one_of(batch[1])), self.rewrite.views, share=self.compiler is None)

    def run_without_part(self, batch: Batch) -> None:
        """Run forward and backward of a pass that other processes wait for: it adds zeros, and no state changes."""
        self.sites.deactivate()
        terms = [term for term in self.rewrite.terms.values() if term.of_parameters]
        scalars = self._graph_scalars(batch, MicroBatchSlice()) if terms else {}
        with keep_state(self.module), self.autocast():
            read = self.losses.run(self.forward, copy_inputs(batch))
            with torch.no_grad():  # their sums over shards are exchanged, too
                for term in terms:
                    term.evaluate(self.read(read.logits, batch, scalars))
            nothing_of(read.of.values()).backward()

    def _check_preconditions(self, batch: Batch, *, calibrating: bool = False) -> None:
        """Check once, before the first measurement or two views, that this model and loss allow them."""
        self.refuse_mixing()
        if calibrating or self._counts:
            self.settle([batch])
        if not self._views_checked and self.module.training and self.rewrite.views > 1:
            with self.autocast(), self.apart():
                check_views(self.module, self.sites, batch, self.losses)
            self._views_checked = True
        if not self._branches_checked and self.module.training:
            with self.autocast(), self.apart():
                run = partial(self.losses.call, self.module, copy_inputs(batch))
                check_branches(self.module, self.sites, self.method.rewrite, run)
            self._branches_checked = True
        changes = not self._weights_checked and any(site.weight for site in self.rewrite.hooks)
        if changes and self.module.training:
            with self.autocast(), self.apart():
                check_changed_weights(self.module, self.sites, batch, self.losses)
            self._weights_checked = True
        measures = calibrating or bool(self.rewrite.measured)
        if not self._checked and self.module.training and measures:
            with self.autocast(), self.apart():
                self._checked = check_preconditions(self.module, self.sites, batch, self.losses)

    def count_classes(self, batch: Batch) -> int:
        """Return how many classes the logits of the first loss have, by a pass that leaves nothing behind."""
        with self.sites.inactive(), undisturbed(self.module), torch.no_grad(), eager_operations():
            with self.autocast(), self.apart():
                read = self.losses.run(self.module, copy_inputs(batch))
            return self.loss_fn.classes_last(read.logits, one_of(batch[1])).shape[-1]

    def _run_forward(
        self, model: Any, batch: Batch, loss_weight: float, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Forward]:
        """Return what `_forward` does, by compiled code where the spec asks for it and nothing is left to look for."""
        if self.compiler is None or not self.covered:
            return self._forward(model, batch, loss_weight, scalars)

        def keep() -> Callable[[], None]:
            undo = self.kept_state()

            def restore() -> None:
                undo()
                if self.rewrite:
                    self._activate(batch, scalars)

            return restore

        state = state_of("the modules", self.module, batch, self.rewrite)
        return self.compiler.run(
            model, state, keep, lambda found: self._forward(found, batch, loss_weight, scalars)
        )

    def compiled_state(self) -> dict[str, Any]:
        """Return what a checkpoint has of compiled code: what runs compiled, and that nothing is left to look for."""
        if self.compiler is None:
            return {}
        seen = {"covered": self.covered, "watched": self.watched}
        return {"compiled": {**self.compiler.state_dict(), **seen}}

    def load_compiled(self, state: Mapping[str, Any], *, accept: bool) -> None:
        """Go on with compiled code as `compiled_state` says, so that a resumed run has the same bits."""
        found = state.get("compiled")
        if self.compiler is not None and found is not None:
            self.compiler.load_state_dict(found, accept=accept)
            self.covered, self.watched = bool(found["covered"]), bool(found["watched"])

    def kept_state(self) -> Callable[[], None]:
        """Return what gives the model's buffers, and all random generators, the values of now back."""
        buffers, randoms = ChangingBuffers(self.module), random_states(self.module)
        buffers.keep()

        def restore() -> None:
            buffers.restore()
            randoms()

        return restore

    def _forward(
        self, model: Any, batch: Batch, loss_weight: float, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Forward]:
        """Return the loss to differentiate, the loss without its weight, the loss terms by name, and what was read."""
        with self.autocast():
            forward = self._pass(model, batch, scalars)
            loss, total, values = self._total(forward, loss_weight)
        return total, loss, {name: value.detach() for name, value in values.items()}, forward

    def _pass(self, model: Any, batch: Batch, scalars: Mapping[str, Tensor]) -> Forward:
        """Run the model on every view, and return what terms and observers read."""
        views, dropout = self.rewrite.views, self._dropout(batch)
        with self.reading() as captured, nullcontext() if dropout is None else dropout.watch():
            read = self.losses.run(model, batch, views, self.rewrite.mean_loss)
        self.drawn_apart = () if dropout is None else dropout.notes
        forward = self.read(read.logits, batch, scalars, views, captured)
        return replace(forward, outputs=read.of, all_targets=batch[1])

    def _total(
        self, forward: Forward, loss_weight: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, the total to differentiate, and the terms by name; see `total_loss`."""
        if not loss_weight:
            return loss_without_targets(forward, self.rewrite)
        return total_loss(forward, self.losses, self.rewrite, loss_weight)

    def _trial_modules(
        self,
        batch: Batch,
        scalars: Mapping[str, Tensor],
        loss_weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
        of: Mapping[str, Tensor] | None = None,
        *,
        compiled: bool = False,
    ) -> TrialResult:
        """Return what the modules compute; no gradient is accumulated and no statistic kept.

        The gradients are of the parameters that train, or of the tensors `of`. With `compiled` the modules may be.
        """
        self._activate(batch, scalars)
        # DistributedDataParallel expects every forward pass to be followed by an exchange of gradients.
        forward = self.forward if self.replicas is None else self.module
        try:
            with self.statistics.paused(), self.apart():
                run = self._run_forward if compiled else self._forward
                total, *_ = run(forward, batch, loss_weight, scalars)
                total = total if scaler is None else scaler.scale(total)
                trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
                named = trained if of is None else of
                probes = self.sites.probes()
                wanted = [*named.values(), *probes.values()]
                with no_autocast([total.device.type]):
                    found = gradients_of(total, wanted, self.parameters.values())
        finally:
            self.sites.deactivate()
        squares = {n: g for n, g in zip(probes, found[len(named) :], strict=True) if g is not None}
        gradients: dict[str, Tensor | None] = dict(zip(named, found, strict=False))
        return TrialResult(total.detach(), gradients, self.statistics.squares(squares))

    def contributions(self, batch: Batch) -> dict[str, Tensor]:
        """Return per-example squared norms by brute force: one backward pass per example, module by module.

        Each example has the noise it has in the whole batch; loss terms over parameters contribute to no example.
        """
        where = MicroBatchSlice.of_first_samples(batch)
        return self._one_by_one(batch, where, self.statistics.parameters).sq_norms

    def calibrate(self, batch: Batch, where: MicroBatchSlice, examples: int) -> CalibrationSample:
        """Measure every trainable parameter on the first `examples` of each replica's micro-batch; no state changes."""
        first = copy_inputs(split_batch(batch, examples)[0])
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        instead = "measure all layers in every step, without calibration"
        refuse_shards("an example's own", names, self.parameters, instead)
        self.batch_norms.refuse_mixed()
        self._check_preconditions(first, calibrating=True)
        with undisturbed(self.module):
            return self._one_by_one(first, where, names, self.replicas)

    def _one_by_one(
        self,
        batch: Batch,
        where: MicroBatchSlice,
        names: Sequence[str],
        replicas: Replicas | None = None,
    ) -> CalibrationSample:
        weights, slice_of = slices_of_examples(self.losses, batch[1], where)

        def loss_of(example: int, one: Batch) -> Tensor:
            scalars = self._scalars(one, slice_of(example))
            self._activate(one, scalars)
            return self._forward(self.module, one, 1.0, scalars)[1]

        self._check_preconditions(batch)
        try:
            parameters = {name: self.parameters[name] for name in names}
            with self.apart():
                return measure_one_by_one(batch, weights, loss_of, parameters, replicas)
        finally:
            self.sites.deactivate()

    def _result(
        self, batch: Batch, where: MicroBatchSlice, loss: Tensor, terms: dict[str, Tensor]
    ) -> MicroBatchResult:
        result = self.result(where, loss, terms, self.losses)
        if self.statistics.wanted:
            self.statistics.weigh(result, self.losses, batch, where)
        return result

    def _scalars(self, batch: Batch, where: MicroBatchSlice) -> dict[str, Tensor]:
        """Return the numbers of modules by name: none in a whole step that nothing rewrites or adds to now."""
        rewrite = self.rewrite
        if where.loss_weight == 1.0 and not (
            rewrite or rewrite.terms or self.losses.is_sum or self.losses.scalars
        ):
            return {}
        return self._graph_scalars(batch, where)

    def _graph_scalars(self, batch: Batch, where: MicroBatchSlice) -> dict[str, Tensor]:
        """Return a graph's numbers by name, and what terms read; it serves with and without accumulation."""
        terms, output = self.rewrite.terms.values(), self.loss_fn.logits_output
        with self.autocast():  # terms may read what another model makes of the batch
            labels = partial(self.losses.keywords, self.module, batch)
            shape = partial(self._shape_of_logits, batch)
            read = read_by_terms(terms, batch, where, output, shape, labels)
        return self.numbers(where, one_of(batch[1]).device) | read

    def _shape_of_logits(self, batch: Batch) -> Sequence[int]:
        """Return the shape of one example's logits, by a pass in eval mode that changes nothing."""
        one = copy_inputs(split_batch(batch, 1)[0])
        alone = self.apart(), undisturbed(self.module), in_mode(self.module, training=False)
        with alone[0], alone[1], alone[2], self.sites.inactive(), torch.no_grad():
            read = self.losses.run(self.module, one)
        return self.read(read.logits, one).logits.shape[1:]

    def _activate(self, batch: Batch, scalars: Mapping[str, Tensor]) -> None:
        units, targets = self.rewrite.example_units, one_of(batch[1])
        index = ExampleIndex(len(targets)) if units is None else units.divide(batch)
        self.activate(index, scalars, targets.device, batch[0])
