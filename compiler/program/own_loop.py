"""A program in a loop that computes its own loss, or that is a framework's: what `Program` offers to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from trainc.compiler.per_example.micro_batch import slice_of_step
from trainc.compiler.program.as_optimizer import Examples, ProgramOptimizer
from trainc.compiler.program.own_loss import OwnMicroBatch, Read, check_number, example_weights
from trainc.compiler.program.save import SavableProgram
from trainc.compiler.program.step_runner import StepRunner
from trainc.runtime.data.sample_ids import ids_of

if TYPE_CHECKING:
    from trainc.compiler.program.program import Program


class OwnLoopProgram(SavableProgram):
    """Base of `Program`: micro-batches with a loss of the user's own, and the program as an optimizer."""

    _runner: StepRunner

    @contextmanager
    def micro_batch(
        self,
        examples: int,
        *,
        weights: Sequence[float] | Tensor | None = None,
        tokens: int | None = None,
        loss_weight: float = 1.0,
        example_fraction: float | None = None,
        sample_ids: Tensor | None = None,
    ) -> Iterator[None]:
        """Inside `with program.micro_batch(len(x)):` run the model, and compute a loss, in any way you like.

        Then call `backward(loss)`. `examples` is the number of examples in the block's passes; `weights` (examples,)
        are their weights in its loss where these are not equal, such as their numbers of tokens. `tokens` is what the
        clock counts, the examples unless given; `loss_weight`, `example_fraction` and `sample_ids` are as in `loss`.
        The model runs by its modules. Raises SiteError where a clause needs several passes or other inputs: it names
        what to call instead. An error inside the block leaves the step as it was before it.
        """
        self._evaluation.check_outside("micro_batch")
        check_number("examples", examples, 1)
        if tokens is not None:
            check_number("tokens", tokens, 0)
        device = self.execution.device
        (ids,) = ids_of(
            sample_ids,
            [(None, torch.empty(examples, device=device))],
            self._runner.id_readers,
            listed=False,
        )
        where = replace(slice_of_step(loss_weight, example_fraction), sample_ids=ids)
        of_loss = example_weights(weights, examples, device)
        count = examples if weights is None else float(torch.as_tensor(weights).double().sum())
        seen = examples if tokens is None else tokens
        own = OwnMicroBatch(examples, of_loss, seen, where, count=count)
        with self._runner.micro_batch(own):
            yield

    def backward(
        self,
        loss: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        inputs: Any = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Run the backward pass of the loss that a `micro_batch` block computed, with every term the spec adds.

        `loss` is 0-d: the mean over the micro-batch's examples or targets, not divided by the number of micro-batches.
        `logits`, `targets` and `inputs` are for clauses that read them. With a GradScaler the loss is scaled; give it
        to `update`, too. Returns what was differentiated, without gradient. Raises ValueError for another loss, and
        where a clause needs what was not given.
        """
        self._evaluation.check_outside("backward")
        return self._runner.backward(loss, Read(logits, targets, inputs), scaler)

    def as_optimizer(
        self, accumulation: int = 1, examples: Examples | None = None, *, watch: bool = True
    ) -> ProgramOptimizer:
        """Return this program as a torch optimizer, for a framework that calls the model, `backward()` and `step()`.

        Each call of `module` in train mode is then a micro-batch, whose loss is the one that the model returns (as
        `output.loss`, or as the only number in a tuple), or else the one given to `optimizer.loss(loss)`. A step has
        `accumulation` of them, and the framework divides their losses. `examples(args, kwargs)` returns the number of
        examples of a call where its tensors have different first axes. Without `watch` only what runs inside
        `optimizer.micro_batch` is one. Raises SiteError or ValueError if a clause needs several passes, or sample ids.
        """
        optimizer = ProgramOptimizer(cast("Program", self), self._runner, accumulation)
        if watch:
            optimizer.watch_model(examples)
        return optimizer
