"""Ranked preferences: what is preferred should have the higher score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.loss._base import LossConstruct
from trainc.compiler.method.loss import Loss, LossMismatch

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


class RankedLoss(Loss):
    """Mean over examples of the mean over pairs of softplus(r_bad - r_good).

    Scores r (B, n), (B, n, 1), or (B * n,) and (B * n, 1) with those of an example side by side. Targets (B,) int64,
    the index of the best, or grades (B, n), of which the higher is better and equal ones and NaN make no pair.
    """

    name = "ranked"

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import softplus

        scores = self._scores(outputs, targets)
        pairs = self._pairs(targets, scores.shape[1])
        # [b, i, j] is r_j - r_i, where i is the better one.
        each = softplus(scores.unsqueeze(1) - scores.unsqueeze(2)).where(pairs, 0.0).sum((1, 2))
        number = pairs.sum((1, 2))
        mean: Tensor = (each / number.clamp_min(1)).sum() / (number > 0).sum()
        return mean

    def target_weights(self, targets: Tensor) -> Tensor:
        """Return 1 for each example that has a pair, float64 (B,)."""
        if targets.dim() == 1:
            return (targets != self.ignore_index).double()
        return self._pairs(targets, targets.shape[1]).flatten(1).any(1).double()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[float, float]]:
        """Return how much of the pairs has the higher score at the better one, mean over examples, as `accuracy`."""
        scores = self._scores(outputs, targets)
        pairs = self._pairs(targets, scores.shape[1])
        right = (scores.unsqueeze(2) > scores.unsqueeze(1)) & pairs
        number = pairs.sum((1, 2))
        found = right.sum((1, 2)) / number.clamp_min(1)
        return {"accuracy": (float(found.sum()), float((number > 0).sum()))}

    def misfit(self, targets: Tensor) -> str | None:
        """Return what to write for one floating-point number an example."""
        if targets.dim() != 1 or not targets.is_floating_point():
            return None
        return (
            f"the targets {list(targets.shape)} of `loss ranked` are floating-point numbers with one axis: give the"
            " index of the best of each example, `targets.long()`, or a grade for each score, (B, n)"
        )

    def out_of_range(self, targets: Tensor) -> str | None:
        """Return what to write for an index below 0 that is not ignored."""
        counted = targets[self.counted(targets)] if targets.dim() == 1 else targets[:0]
        if not (counted < 0).any():
            return None
        return (
            f"a target of `loss ranked` is {int(counted.min())}, and must be the index of the best score, from 0; mark"
            f" examples that are to be left out by `ignore_index`, which is {self.ignore_index}"
        )

    def _scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scores (B, n); raises LossMismatch where the output has another form."""
        if (why := self.misfit(targets)) is not None:
            raise LossMismatch(why)
        examples, shape = len(targets), outputs.shape
        plain = outputs.squeeze(-1) if outputs.dim() > 1 and shape[-1] == 1 else outputs
        if plain.dim() == 1 and examples and plain.shape[0] % examples == 0:
            plain = plain.reshape(examples, -1)
        fits = plain.dim() == 2 and plain.shape[0] == examples
        if fits and targets.dim() == 2:
            fits = plain.shape == targets.shape
        if not fits or targets.dim() > 2:
            raise LossMismatch(
                f"the model's output has shape {list(shape)} and the targets {list(targets.shape)}; `loss ranked` needs"
                " scores (B, n) of n answers to compare, and the index (B,) of the best of them, or grades (B, n)"
            )
        if plain.shape[1] < 2:
            raise LossMismatch(
                f"the model's output {list(shape)} is one score an example, and `loss ranked` compares those within an"
                " example: let an example hold all answers to compare, inputs (B, n, ...), and return scores (B, n)"
            )
        return plain

    def _pairs(self, targets: Tensor, answers: int) -> Tensor:
        """Return where i is better than j, bool (B, n, n)."""
        import torch

        if targets.dim() > 1:
            return targets.unsqueeze(2) > targets.unsqueeze(1)
        best = torch.arange(answers, device=targets.device) == targets.unsqueeze(1)
        return best.unsqueeze(2) & ~best.unsqueeze(1)


class Ranked(LossConstruct):
    """Trains scores so that what is preferred has the higher one: the mean of `log(1 + exp(r_bad - r_good))`.

    An example holds all answers to one question, two or more, and the model returns their scores,
    (B, n), or (B * n,) with those of an example side by side. The targets are the index of the best,
    int64 (B,), or a grade for each, (B, n): the higher is better, and equal grades and NaN make no
    pair. An example's loss is the mean over its pairs, and the loss the mean over the examples that
    have one, whatever their number of pairs. For a model that takes texts one by one let `forward`
    fold the axis: `self.scorer(ids.flatten(0, 1))`.
    """

    cite: ClassVar = (
        "Askell et al., A General Language Assistant as a Laboratory for Alignment, 2021, "
        "arXiv:2112.00861; the model of pairs: Bradley and Terry, Biometrika 39 (1952) 324"
    )
    usage: ClassVar = "loss ranked"
    evaluated: ClassVar = ("accuracy",)
    functions: ClassVar = ("trainc.compiler.constructs.loss.ranked:ranked_loss",)

    ignore_index: int = Field(
        default=-100, description="index of the best that leaves an example out"
    )

    def make_loss(self) -> Loss:
        return RankedLoss(self.ignore_index)

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; scores (B, n), targets (B,) or (B, n)."""
        examples = []
        for scores, target in zip(outputs, targets, strict=True):
            n = range(len(scores))
            grades = target if target.dim() else outputs.new_tensor([i == target for i in n])
            pairs = [(i, j) for i in n for j in n if grades[i] > grades[j]]
            if pairs and (target.dim() or target != self.ignore_index):
                losses = [(1 + (scores[j] - scores[i]).exp()).log() for i, j in pairs]
                examples.append(sum(losses) / len(losses))
        return sum(examples, start=outputs.new_zeros(())) / len(examples)


def ranked_loss(chosen: Tensor, rejected: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the loss of preference pairs, `log(1 + exp(rejected - chosen))`, in the wider of their dtypes.

    `chosen` and `rejected` are scores of one shape, pair by pair; `reduction` gives the mean over all pairs, their sum,
    both 0-d, or `none`, one number for each pair. Raises ValueError where the shapes differ. Source: Askell et al.,
    arXiv:2112.00861.
    """
    from torch.nn.functional import softplus

    if chosen.shape != rejected.shape:
        raise ValueError(
            f"`chosen` has shape {list(chosen.shape)} and `rejected` {list(rejected.shape)}: give the scores of a pair"
            " at the same place of both"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` is {reduction!r}: write mean, sum or none")
    each: Tensor = softplus(rejected - chosen)
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()
