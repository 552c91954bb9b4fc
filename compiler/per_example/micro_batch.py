"""The place of a micro-batch in its step, and its results for the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trainc.compiler.method.losses import Losses, mean_fraction
from trainc.compiler.method.term import Term
from trainc.runtime.data.batch import Batch, one_of


@dataclass(frozen=True, slots=True)
class MicroBatchSlice:
    """Which part of a step a micro-batch is.

    `loss_weight` is its fraction of the step's counted targets, `example_fraction` of its examples, `first_example`
    the number of its first example in the step. `sample_ids` say which samples its examples are, where they are known.
    `fractions` are those of each loss of a sum, by name: NaN for one that counts no target in the step; the loss weight
    is then their mean. `stream` is that of its random numbers: processes whose examples have the same numbers differ in
    it. `own_weight` is its loss weight in its own process, where that is another and parameters are sharded.
    """

    loss_weight: float = 1.0
    example_fraction: float = 1.0
    first_example: int = 0
    sample_ids: Tensor | None = None
    fractions: Mapping[str, float] = field(default_factory=dict)
    stream: int = 0
    own_weight: float | None = None

    @classmethod
    def of_first_samples(cls, batch: Batch) -> MicroBatchSlice:
        """Return that of a batch of the first samples, outside a step: a whole one, with ids from 0."""
        targets = one_of(batch[1])
        return cls(sample_ids=torch.arange(len(targets), device=targets.device))

    def of_batch(self, batch: Batch, losses: Losses) -> MicroBatchSlice:
        """Return that of a batch whose loss weight the user gave; raises ValueError where one is too few."""
        if not losses.is_sum:
            return self
        if len(losses.parts) > 1 and self.loss_weight != 1.0:
            raise ValueError(
                "the spec has several losses, each of which counts targets of its own, so one `loss_weight` does not"
                " say what a micro-batch has of each: in place of `loss`, `backward` and `update` call"
                " `program.step([first, second, ...])` with all micro-batches"
            )
        (whole,) = losses.fractions([losses.counts(batch[1])])
        own = {name: fraction * self.loss_weight for name, fraction in whole.items()}
        return replace(self, fractions=own)

    def lacks_targets(self, losses: Losses) -> bool:
        """Say whether one of the losses of a sum counts no target, where a graph would have a mean over none."""
        return losses.is_sum and not all(self.share_of(part.label) for part in losses.parts)

    def fraction_of(self, label: str) -> float:
        """Return the fraction of a loss: of its counted targets in the step."""
        return self.fractions.get(label, self.loss_weight)

    def fractions_of(self, terms: Iterable[Term], losses: Losses | None) -> dict[str, float]:
        """Return by name the fraction of each term and each loss of a sum: of what its mean runs over in the step."""
        own = {"examples": self.example_fraction}
        of_sum = losses.parts if losses is not None and losses.is_sum else ()
        if of_sum:
            own["targets"] = self.fraction_of(of_sum[0].label)
        found = {term.label: own.get(term.over, self.loss_weight) for term in terms}
        return found | {part.label: self.fraction_of(part.label) for part in of_sum}

    def share_of(self, label: str) -> float:
        """Return what a loss of a sum is multiplied by besides the loss weight; 0 where it counts no target."""
        fraction = self.fraction_of(label)
        known = not math.isnan(fraction) and self.loss_weight
        return fraction / self.loss_weight if known else 0.0


WHOLE = MicroBatchSlice()
"""A step of one micro-batch."""


def slice_of_step(loss_weight: float, example_fraction: float | None) -> MicroBatchSlice:
    """Return the slice of these fractions, which may be 0-d tensors; examples are as targets unless they are given.

    Raises ValueError unless both are finite and 0 or more.
    """
    weight = _fraction("loss_weight", loss_weight)
    if example_fraction is None:
        return MicroBatchSlice(weight, weight)
    return MicroBatchSlice(weight, _fraction("example_fraction", example_fraction))


def _fraction(name: str, given: float | Tensor) -> float:
    plain = isinstance(given, Tensor) and given.numel() == 1
    if plain or (isinstance(given, Real) and not isinstance(given, bool)):
        found = float(given)
        if math.isfinite(found) and found >= 0:
            return found
    shown = type(given).__name__ if isinstance(given, Tensor) and not plain else repr(given)
    raise ValueError(
        f"`{name}` is {shown}: expected the micro-batch's fraction of the step, a number from 0 to 1"
    )


def slices(
    micro_batches: Sequence[Batch],
    losses: Losses,
    first_example: int,
    sample_ids: Sequence[Tensor | None],
) -> list[MicroBatchSlice]:
    """Return the slice of each micro-batch of a step; the loss weight is 0 if no target is counted.

    Where none counts in the whole step, its loss is NaN, as a mean over nothing is: one micro-batch has the
    weight of all.
    """
    if losses.is_sum:
        return _slices_of_sum(micro_batches, losses, first_example, sample_ids)
    if len(micro_batches) == 1:
        ids = sample_ids[0]
        return [WHOLE if ids is None else MicroBatchSlice(sample_ids=ids)]
    counts = [sum(losses.counts(targets).values()) for _, targets in micro_batches]
    examples = [len(one_of(targets)) for _, targets in micro_batches]
    if not any(counts):
        # The weights of classes may all be 0: then 0/0 has a gradient, and that of no target has none.
        part = losses.parts[0]
        counted = (part.loss.counted(part.targets(y)) for _, y in micro_batches)
        unweighted = (i for i, one in enumerate(counted) if one.any())
        counts[next(unweighted, 0)] = 1
    found = []
    for count, number, ids in zip(counts, examples, sample_ids, strict=True):
        weight = count / sum(counts) if count else 0.0
        found.append(MicroBatchSlice(weight, number / sum(examples), first_example, ids))
        first_example += number
    return found


def slices_of_examples(
    losses: Losses, targets: Any, where: MicroBatchSlice
) -> tuple[Tensor, Callable[[int], MicroBatchSlice]]:
    """Return the weights of the examples in their micro-batch, and the slice of each, alone, by number.

    Alone an example's loss is the mean over its own targets: that of a sum has each loss as often as in the batch.
    """
    weights = losses.example_weights(targets, {})
    fractions = losses.example_fractions(targets) if losses.is_sum else {}

    def slice_of(example: int) -> MicroBatchSlice:
        ids = None if where.sample_ids is None else where.sample_ids[example : example + 1]
        own = {name: float(one[example] / weights[example]) for name, one in fractions.items()}
        first = where.first_example + example
        return MicroBatchSlice(1.0, 1.0, first, ids, own, where.stream)

    return weights, slice_of


def require_same_count(losses: Losses, names: Sequence[str], before: Any, after: Any) -> None:
    """Raise ValueError where clauses changed targets so that a loss weight, given for those before, does not fit."""
    counts = [losses.counts(targets) for targets in (before, after)]
    if counts[0] != counts[1]:
        changed = ", ".join(f"`{name}`" for name in names)
        texts = [" and ".join(f"{number:g}" for number in count.values()) for count in counts]
        raise ValueError(
            f"{changed} changed how many targets of this micro-batch count, from {texts[0]} to {texts[1]}, so its"
            " `loss_weight` does not fit: in place of `loss`, `backward` and `update` call"
            " `program.step([first, second, ...])` with all micro-batches, which computes the weights afterwards"
        )


def _slices_of_sum(
    micro_batches: Sequence[Batch],
    losses: Losses,
    first_example: int,
    sample_ids: Sequence[Tensor | None],
) -> list[MicroBatchSlice]:
    """Return what `slices` does for several losses, each of which counts targets of its own."""
    fractions = losses.fractions([losses.counts(targets) for _, targets in micro_batches])
    examples = [len(one_of(targets)) for _, targets in micro_batches]
    if math.isnan(mean_fraction(fractions[0])):
        fractions = [
            {part.label: float(not i) for part in losses.parts} for i in range(len(examples))
        ]
    found = []
    for own, number, ids in zip(fractions, examples, sample_ids, strict=True):
        weight, fraction = mean_fraction(own), number / sum(examples)
        found.append(MicroBatchSlice(weight, fraction, first_example, ids, own))
        first_example += number
    return found


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
    example_weights: Tensor | None = None
    """Weights of single examples (examples,), where `weights` are those of groups."""
    total: Tensor | None = None
    """What was differentiated: the loss with all of its terms, times its weight in the step."""
    targets: Any = None
    """The targets of the micro-batch."""
    loss_weight: float = 1.0
    """Its fraction of the step's counted targets."""
    example_fraction: float = 1.0
    """Its fraction of the step's examples."""
    notes: tuple[str, ...] = ()
    """What the user should know of how it ran."""
    by_framework: bool = False
    """Whether other code multiplied the loss before its backward pass: `loss_scale` has the weight of this micro-batch
    as a factor, until `weigh_by_gradients` takes it out."""
