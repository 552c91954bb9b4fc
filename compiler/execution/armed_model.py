"""A bound model while it runs for a step: its sites armed, what clauses read of a pass, and a micro-batch's results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.compiled import Compiler
from trainc.compiler.execution.distributed import (
    Wrappers,
    first_shard,
    refuse_tensor_parallel,
    replicas_of,
)
from trainc.compiler.execution.scalars import noise_scalars, scheduled_scalars
from trainc.compiler.layers.bound_modules import Sites, replace_layers
from trainc.compiler.method.example_units import ExampleIndex, Groups
from trainc.compiler.method.loss import Loss, LossMismatch
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import Forward
from trainc.compiler.method.user_loss import UserLoss
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.model.eager import differentiable_checkpoints
from trainc.compiler.per_example.loss_counting import settle
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.per_example.mixing import BatchNorms
from trainc.compiler.per_example.statistics import Statistics
from trainc.compiler.replay.replayed import Replays
from trainc.compiler.structure.wrappers import name_through, unwrapped
from trainc.runtime.data.batch import Batch, one_of
from trainc.runtime.mask.replica_entries import ReplicaEntries
from trainc.runtime.mask.update_mask import mask_of
from trainc.runtime.processes.replica_group import ReplicaGroup, world_size
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.replicas import Replicas


class ArmedModel:
    """The bound model of one program: what every way of running a micro-batch needs of it."""

    def __init__(self, model: nn.Module, method: LoweredMethod, seed: int, clock: Clock) -> None:
        self.module = model
        self.forward: Any = model
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """What forward passes and losses run in; backward passes and the update do not."""
        self.wrappers: list[DistributedDataParallel] = []
        """What averages gradients of the model or of parts of it."""
        self._wrappers = Wrappers(model)
        self.method = method
        self.losses = method.losses
        self.seed, self.clock = seed, clock
        self.parameters = dict(model.named_parameters())
        self.trained = dict.fromkeys(n for n, p in self.parameters.items() if p.requires_grad)
        """The parameters that an optimizer has, also where the user freezes them for some steps."""
        refuse_masks(self.parameters)
        refuse_tensor_parallel(model)
        self.sites: Sites = replace_layers(model, method.rewrite)
        self.compiler = Compiler(self.sites.layers) if method.compiled else None
        self.replays = Replays(model, wanted=method.replayed)
        self.masked = ReplicaEntries(model, method.masks)
        self.exchange_group: ReplicaGroup | None = None
        """The processes that this one exchanges with after steps; their gradients are their own."""
        self.statistics = Statistics(method, self.parameters, clock)
        # Of inputs without gradient a reentrant checkpoint gives results without one: nothing in it would be trained.
        self._freezes = bool(method.frozen or adapters_of(model))
        more = [method.batch_gradients, method.rewrite.observers, self._freezes, self.losses.is_sum]
        more += [self.losses.scalars, method.rewrite.checkpointed, method.compiled, method.replayed]
        self._unchanged = not (method.rewrite or method.rewrite.terms or any(more))
        self._counts = _counts_targets(method)
        self._weighs_evaluations = self._looked = self._weights_checked = False
        self._settled = not any(isinstance(part.loss, UserLoss) for part in self.losses.parts)
        self.covered = not (method.rewrite or method.rewrite.checkpointed)
        """Whether a pass has shown that every site of the plan runs. Compiled code can run from then on."""
        self.watched = self._checked = self._views_checked = self._branches_checked = False
        self.drawn_apart: tuple[str, ...] = ()
        """Notes on what drew for each view apart in the last pass."""
        self.batch_norms = BatchNorms(model)
        self.whole = False
        """Whether no parameter is sharded, as the first step finds."""

    def look_again(self) -> None:
        """Check in the next step what is checked once, since the model has other modules or tensors now."""
        self.covered = not (self.method.rewrite or self.method.rewrite.checkpointed)
        self.watched = self._checked = self._views_checked = False
        self._branches_checked = self._weights_checked = False
        self.batch_norms = BatchNorms(self.module)

    def refuse_mixing(self) -> None:
        """Raise ExamplesMix where a BatchNorm mixes the gradients that are measured in this step."""
        rewrite = self.rewrite
        if rewrite.measured:
            self.batch_norms.refuse_mixed(by_groups=isinstance(rewrite.example_units, Groups))
        if self.statistics.batch_gradients:
            self.batch_norms.refuse_joined_replicas()

    def settle(
        self, batches: Sequence[Batch], *, divided: bool = True, together: bool = False
    ) -> None:
        """Find what losses of the user's own code count, once, where a step is `divided` or a clause asks.

        With `together` all processes that train with this one call it, and find the same. Raises SiteError or
        LossMismatch where it cannot be told.
        """
        if not self._looked:
            self._looked = True
            _refuse_own_inputs(self.module, self.losses, batches[0])
        if self._settled or not (divided or self._counts or world_size() > 1):
            return
        if together:
            self.find_wrappers()
        several = (one for one in batches if len(one_of(one[1])) > 1)
        with self.autocast(), self.apart():
            few, peers = next(several, batches[0]), None
            if together:
                peers = self.replicas or self.exchange_group
            self._settled = settle(self.module, self.sites, self.losses, few, peers)

    def settle_for_evaluation(self, batch: Batch) -> None:
        """Do what `settle` does; where it cannot be told, the means of batches are weighed by their targets."""
        if self._settled or self._weighs_evaluations or world_size() > 1:
            return  # not every process evaluates
        try:
            self.settle([batch])
        except (SiteError, LossMismatch):
            self._weighs_evaluations = True

    @property
    def loss_fn(self) -> Loss:
        """The first loss, which terms of clauses read."""
        return self.losses.first

    @property
    def rewrite(self) -> Rewrite:
        """What changes in the forward pass of this step."""
        return self.method.rewrite.at(self.clock)

    @property
    def replicas(self) -> Replicas | None:
        """The processes that average gradients with this one; None where it trains alone."""
        if self.whole and self.forward is self.module and not self.wrappers:
            return None
        return replicas_of(self.forward, self.module, self.parameters, self.wrappers)

    def find_wrappers(self) -> None:
        """Find what averages gradients, and run the model by the DistributedDataParallel around it, if there is one."""
        name_through(self.module)
        refuse_tensor_parallel(self.module)
        if world_size() == 1 or first_shard(self.parameters):
            return
        self.wrappers = self._wrappers.find(self.forward)
        if self.forward is self.module:
            around = (one for one in self.wrappers if unwrapped(one) is self.module)
            self.forward = next(around, self.module)

    def apart(self) -> AbstractContextManager[Any]:
        """Let passes besides those of the step run here alone, where submodules are wrapped in what exchanges."""
        return self.no_sync() if self.wrappers and self.forward is self.module else nullcontext()

    @property
    def exchanges_now(self) -> bool:
        """Whether the backward pass of a forward pass that begins now will average gradients (no `no_sync()`)."""
        if world_size() == 1 or (self.forward is self.module and not self.wrappers):
            return False
        return all(one.require_backward_grad_sync for one in self.wrappers)

    @property
    def meets_in_passes(self) -> bool:
        """Whether every process waits for the others in every pass: to gather weights, or in a static graph."""
        return not self.whole or any(one.static_graph for one in self.wrappers)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Keep replicas from averaging gradients inside the block, where they can be kept from it."""
        found = getattr(self.forward, "no_sync", None)
        if not self.wrappers or self.meets_in_passes:
            return nullcontext() if self.wrappers or found is None else found()
        blocks = ExitStack()
        for one in self.wrappers:
            blocks.enter_context(one.no_sync())
        return blocks

    @contextmanager
    def reading(self) -> Iterator[dict[str, Sequence[Tensor]]]:
        """Let the sites take part in the passes inside this block; yields what captured modules gave, at its end."""
        rewrite = self.rewrite
        captures, captured = rewrite.captures, dict[str, Sequence[Tensor]]()
        for keep in captures.values():
            keep.begin()
        through = rewrite.leaves_checkpoints or self._freezes
        checkpoints = differentiable_checkpoints() if through else nullcontext()
        with checkpoints, self.sites.in_pass() if rewrite else nullcontext():
            yield captured
        captured |= {module: keep.take() for module, keep in captures.items()}

    def news(self, modules: str = "") -> tuple[str, ...]:
        """Return what is to say of compiled and replayed passes; `modules` is why these ran a pass, "" for a graph."""
        self.replays.explain(modules)
        return (() if self.compiler is None else self.compiler.notes()) + self.replays.notes()

    def runs_without_targets(self, where: MicroBatchSlice) -> bool:
        """Say whether a micro-batch has no part in the loss but for terms over examples: then the modules run it."""
        return not where.loss_weight and self.rewrite.of_examples

    def lacks_targets(self, where: MicroBatchSlice) -> bool:
        """Say whether a loss counts no target in a micro-batch, which then only the modules can run."""
        return self.runs_without_targets(where) or where.lacks_targets(self.losses)

    def read(
        self,
        output: Tensor,
        batch: Batch,
        scalars: Mapping[str, Tensor] | None = None,
        views: int = 1,
        captured: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> Forward:
        """Return what terms and observers read of a pass."""
        inputs, ignored = batch[0], self.loss_fn.ignore_index
        targets = self.losses.targets_to_read(batch[1])
        others = inputs, views, self.parameters, scalars or {}, ignored, captured or {}
        return Forward.of_loss(self.loss_fn, output, targets, *others)

    def observe(self, forward: Forward, where: MicroBatchSlice) -> None:
        """Show a micro-batch to the observers of this step."""
        if observers := self.rewrite.observers:
            seen = forward.detached()
            if where.sample_ids is not None:
                seen = seen.with_ids(where.sample_ids)
            with torch.no_grad():
                for observer in observers:
                    observer.read(seen)

    def result(
        self,
        where: MicroBatchSlice,
        loss: Tensor,
        terms: dict[str, Tensor],
        losses: Losses | None = None,
    ) -> MicroBatchResult:
        """Return a micro-batch's part in the loss of its step and in its terms, whose values are given unweighted.

        Of several `losses` the values are among the terms.
        """
        parts = where.fractions_of(self.method.rewrite.terms.values(), losses)
        # A closed term is 0, so that the metrics of every step have the same names.
        closed = [label for label in parts if label not in terms]
        alone = self.runs_without_targets(where)
        if alone:
            closed.append("data_loss")
        elif "data_loss" not in terms and self.method.rewrite.reads_passes:
            terms["data_loss"] = loss.detach()
        terms |= {name: torch.zeros_like(loss) for name in closed}
        weight = where.loss_weight
        # One micro-batch may hold all of the targets that count, and not all of the examples.
        if (weight, where.example_fraction) != (1.0, 1.0) or where.fractions:
            loss = loss if alone else loss * weight
            terms = {n: value * parts.get(n, weight) for n, value in terms.items()}
        fraction = where.example_fraction
        return MicroBatchResult(
            None, loss.detach(), terms, loss_weight=weight, example_fraction=fraction
        )

    def numbers(self, where: MicroBatchSlice, device: torch.device) -> dict[str, Tensor]:
        """Return by name the scheduled numbers of a micro-batch, and what its noise is drawn with."""
        scalars = scheduled_scalars(self.method, where, self.clock, self._dtype(), device)
        if self.method.rewrite.hooks:
            scalars |= noise_scalars(self.seed, self.clock.steps, where, device)
        return scalars

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(iter(self.parameters.values())).device

    def _dtype(self) -> torch.dtype:
        """Return the dtype of scheduled numbers and statistics: float64 for float64 models, else float32."""
        double = any(p.dtype == torch.float64 for p in self.parameters.values())
        return torch.float64 if double else torch.float32

    def activate(
        self,
        index: ExampleIndex,
        scalars: Mapping[str, Tensor],
        device: torch.device,
        inputs: Any = None,
    ) -> None:
        """Arm the sites of this step for a micro-batch of these examples, and its inputs where they are known."""
        self.sites.activate(index, scalars, self._dtype(), device, self.rewrite, inputs)


def _refuse_own_inputs(model: nn.Module, losses: Losses, batch: Batch) -> None:
    """Raise LossMismatch where the targets are an input of a model that computes a loss of labels, and may shift them.

    A loss of the spec would train each token to predict itself.
    """
    try:
        known = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # one that is not of Python has no signature
        return
    inputs = (
        batch[0] if isinstance(batch[0], Mapping) else dict(zip(known, [batch[0]], strict=False))
    )
    own_labels = (
        "labels" in known and "labels" not in inputs
    )  # with these it returns a loss, which is refused
    for part in losses.parts if own_labels else ():
        targets = None if isinstance(part.loss, UserLoss) else part.targets(batch[1])
        if targets is None or targets.is_floating_point() or targets.dim() < 2:
            continue
        for name, one in inputs.items():
            if (
                isinstance(one, Tensor)
                and one.shape == targets.shape
                and one.dtype == targets.dtype
            ):
                kept = part.loss.counted(targets)
                if bool(kept.any()) and torch.equal(one[kept], targets[kept]):
                    error = LossMismatch(
                        f"the targets are the input `{name}` itself, so `loss {part.loss.name}` would train each token"
                        " to predict itself. The model computes a loss of `labels` by itself, and shifts them where it"
                        " predicts the next token: write `loss model`, or give the next tokens as targets"
                    )
                    error.label, error.field = part.label, ""
                    raise error


def _counts_targets(method: LoweredMethod) -> bool:
    """Say whether something of a method reads what the loss counts, also in a step of one micro-batch."""
    rewrite = method.rewrite
    terms = any(not term.of_parameters for term in rewrite.terms.values())
    measured = rewrite.measured or method.batch_gradients or method.calibrations
    readers = rewrite.observers or method.evaluation_observers or rewrite.view_requests
    return bool(terms or measured or readers or method.losses.is_sum)


def refuse_masks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise SiteError for a parameter of which another program trains some entries."""
    for name, parameter in parameters.items():
        if mask_of(parameter) is not None:
            raise SiteError(
                f"`{name}` has the mask of another program, which decides what of it trains: call that program's"
                " `unbind` first"
            )
