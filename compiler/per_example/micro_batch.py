"""The place of a micro-batch in its step, and its results for the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trainc.compiler.method.loss import Loss
from trainc.runtime.data.batch import Batch


@dataclass(slots=True)
class MicroBatchSlice:
    """Which part of a step a micro-batch is.

    `loss_weight` is its fraction of the step's counted targets, `example_fraction` of its examples, `first_example`
    the number of its first example in the step.
    """

    loss_weight: float = 1.0
    example_fraction: float = 1.0
    first_example: int = 0


def slices(
    micro_batches: Sequence[Batch], loss_fn: Loss, first_example: int
) -> Iterator[MicroBatchSlice]:
    """Yield the slice of each micro-batch of a step; the loss weight is 0 if no target is counted."""
    if len(micro_batches) == 1:
        yield MicroBatchSlice()
        return
    counts = [loss_fn.count(targets) for _, targets in micro_batches]
    examples = [targets.shape[0] for _, targets in micro_batches]
    for count, number in zip(counts, examples, strict=True):
        weight = count / sum(counts) if count else 0.0
        yield MicroBatchSlice(weight, number / sum(examples), first_example)
        first_example += number


@dataclass(slots=True)
class MicroBatchResult:
    """The results of a micro-batch that the update needs.

    `weights` (units,) are those of its examples in the step's loss, where something is measured; units are examples,
    or the groups or documents that stand for them. `probes` hold the statistics by module once `backward()` has run,
    `batch_sq_norms` the squared norms of the micro-batch's gradient by parameter, `loss_scale` what the loss was
    multiplied by before `backward()`.
    """

    weights: Tensor | None
    loss: Tensor
    terms: dict[str, Tensor]
    probes: dict[str, Tensor] = field(default_factory=dict)
    batch_sq_norms: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: Tensor | None = None
    synchronised: bool = False
    """Whether the backward pass averaged gradients over replicas."""
    training: bool = True
    """Whether the model was in train mode."""
    example_weights: Tensor | None = None
    """Weights of single examples (examples,), where `weights` are those of groups."""
    notes: tuple[str, ...] = ()
    """What the user should know of how it ran."""
