"""Evaluations of a program: a batch in passes that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.compiler.method.loss import NoLoss, require_loss
from trainc.compiler.method.term import Forward
from trainc.compiler.model.batch_statistics import batch_norms
from trainc.compiler.model.undisturbed import in_mode, random_states
from trainc.runtime.data.batch import Batch, Evaluated, copy_inputs, one_of, split_batch
from trainc.runtime.memory.fitting import EvaluationSize
from trainc.runtime.step.observer import EvaluationObservers


@torch.no_grad()
def estimate_statistics(
    execution: Execution, batches: Callable[[], Iterable[Any]], count: int, of: set[int]
) -> None:
    """Set the running statistics of BatchNorm layers to means over batches, `count` of them or all for 0.

    They are those of the tensors `of`, by `id`. Each batch is normalized by its own statistics; other layers are in
    eval mode. Raises ValueError without a batch.
    """
    model, rewind = execution.module, random_states(execution.module)
    norms = [one for one in batch_norms(model).values() if id(one.running_mean) in of]
    momenta = [one.momentum for one in norms]
    seen = 0
    try:
        with in_mode(model, training=False), execution.sites.inactive():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            for given in islice(batches(), count or None):
                batch = execution.losses.batch(given)
                with execution.autocast():
                    execution.losses.run(model, copy_inputs(batch))
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        rewind()
    if not seen:
        raise ValueError(
            "running statistics are estimated from training batches, and there were none"
        )


def evaluated(
    execution: Execution, batch: Batch, observers: EvaluationObservers, size: int | None
) -> Evaluated:
    """Return the loss summed over the counted targets, their number, and metrics; see `Program.evaluate`.

    The passes are of at most `size` examples each where it is given.
    """
    require_loss(execution.loss_fn)
    execution.settle_for_evaluation(batch)
    parts = split_batch(batch, size or 0)
    found = [_pass(execution, execution.prepare(part), observers) for part in parts]
    return found[0] if len(found) == 1 else execution.losses.joined(found, execution.clock)


def _pass(execution: Execution, batch: Batch, observers: EvaluationObservers) -> Evaluated:
    losses, targets = execution.losses, batch[1]
    with in_mode(execution.module, training=False):
        with execution.autocast():
            read = losses.run(execution.module, batch)
        losses.check_values(targets)
        with execution.autocast(), losses.naming_classes([batch]):
            found = losses.evaluated(read.of, targets, execution.clock)
        if observers:  # after the loss, which names a target that is no class
            observers.see(execution.read(read.logits, batch))
    return found


class Evaluations:
    """Evaluates batches, and repeats those that run out of memory in smaller passes where the spec lets it."""

    def __init__(
        self, execution: Execution, observers: EvaluationObservers, *, goes_on: bool
    ) -> None:
        self.execution, self.observers = execution, observers
        self.size = EvaluationSize(goes_on=goes_on)
        self._news: list[str] = []

    def run(self, batch: Batch, trained: int | None) -> Evaluated:
        """Return sums and counts of a batch; `trained` examples at most are in one pass of training, None for all.

        Raises OutOfMemory, which says what to write, where no pass fits, or a smaller one may not be taken.
        """
        if not (examples := len(one_of(batch[1]))):
            raise ValueError("a batch to evaluate on has no examples: leave it out")
        forget, module = self.observers.kept(), self.execution.module
        rewind = random_states(module) if self.size.goes_on else None

        def attempt(size: int | None) -> Evaluated:
            most = min(filter(None, (size, trained)), default=None)
            return evaluated(self.execution, batch, self.observers, most)

        def undo() -> None:
            forget()
            if rewind is not None:
                rewind()

        samples = min(filter(None, (examples, trained)))
        # Those that shard weights wait for each other in each pass.
        alone = first_shard(dict(module.named_parameters())) is None
        found = self.size.run(attempt, undo, samples, alone=alone)
        if (news := self.size.news(self.execution.clock.steps)) is not None:
            self._news.append(news)
        return found

    @torch.no_grad()
    def read(self, logits: Tensor, targets: Tensor) -> None:
        """Show the observers a batch that code of the user's own evaluated."""
        runs = self.execution
        loss = None if isinstance(runs.loss_fn, NoLoss) else runs.loss_fn
        others: tuple[Any, ...] = (None, 1, runs.parameters, {}, runs.loss_fn.ignore_index)
        if self.observers:
            self.observers.see(Forward.of_loss(loss, logits.detach(), targets, *others))

    def news(self) -> list[str]:
        """Return what to say of the evaluations since this was called last."""
        found, self._news = self._news, []
        return found
