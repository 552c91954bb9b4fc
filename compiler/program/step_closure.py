"""The closure of a step: what an optimizer calls that asks for loss and gradients several times in one update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.compiler.model.undisturbed import random_states
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.program.step_gradients import StepGradients
from trainc.runtime.data.batch import Batch


class StepClosure:
    """Returns, when called, the loss of the whole step at the weights of now, and leaves its gradients in `.grad`.

    The first call is answered by the step's own passes, unless a weight was moved since. Every other runs all
    micro-batches again, with the dropout and noise of these passes; buffers and random states stay as they are. Make it
    before the step's passes. Raises SiteError for sharded parameters.
    """

    def __init__(
        self, execution: Execution, label: str, micro_batches: Sequence[tuple[Batch, MicroBatchSlice]]
    ) -> None:  # fmt: skip
        if (shard := first_shard(execution.parameters)) is not None:
            raise SiteError(
                f"`{shard}` is sharded over processes (FSDP2), and the gradients that `{label}` asks for are not"
                " averaged there: use DistributedDataParallel, or another optimizer"
            )
        self._execution = execution
        self._gradients = StepGradients(execution, micro_batches, None)
        self._rewind = random_states(execution.module)
        self._own: Tensor | None = None

    def keep(self, results: Sequence[MicroBatchResult]) -> None:
        """Keep the loss of the step's own passes for the first call."""
        totals = [result.total for result in results if result.total is not None]
        self._own = self._mean(torch.stack(totals).sum())

    def __call__(self, moved: bool = True) -> Tensor:
        """Return the loss, 0-d: the mean over replicas of what they differentiate.

        `moved`: whether a weight is another than in the step's own passes.
        """
        own, self._own = self._own, None
        if own is not None and not moved:
            return own
        restore = random_states(self._execution.module)
        try:
            self._rewind()
            found = self._gradients()
        finally:
            restore()
        for name, parameter in self._execution.parameters.items():
            parameter.grad = found.get(name)
        return self._mean(self._gradients.loss)

    def _mean(self, loss: Tensor) -> Tensor:
        """Return the mean of a loss over replicas, the same bits on each."""
        replicas = self._execution.replicas
        return (
            loss
            if replicas is None
            else loss.new_tensor(replicas.total(float(loss)) / replicas.size)
        )


def needs_whole_step(why: str, called: str) -> str:
    """Return what is said where a clause needs all micro-batches of a step and `called` gives it one."""
    return (
        f"{why} needs all of its micro-batches, and `{called}` gets one: in place of `{called}`, `backward` and"
        " `update` call `program.step(batch)`, or `program.step([first, second, ...])` with all micro-batches"
    )
