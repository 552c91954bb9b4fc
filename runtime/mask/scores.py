"""Scores of the entries of parameters: the larger a score, the sooner its entry is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from trainc.runtime.mask.allocation import Alphas
from trainc.runtime.mask.entry_choice import Choice
from trainc.runtime.step.gradients import as_dense
from trainc.runtime.step.record import Step
from trainc.runtime.storage.random_streams import derive_seed

Score = Callable[[Step, str], Tensor]
"""Given the step and the name of a parameter, the score of each of its entries, in its shape."""


def magnitude(step: Step, name: str) -> Tensor:
    """Return |w|."""
    return step.parameters[name].detach().abs()


def smallness(step: Step, name: str) -> Tensor:
    """Return -|w|."""
    return -magnitude(step, name)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, detached and dense."""
    dense = as_dense(tensor)
    return dense.detach().to(torch.promote_types(dense.dtype, torch.float32))


@dataclass(frozen=True)
class Principal:
    """|W_r| of W_r, the best approximation of rank r of a weight W as a matrix: axis 0 by all other axes.

    Source: Liu et al., LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
    Supervised Fine-Tuning, ICML 2025, arXiv:2506.00772.
    """

    rank: int

    def __call__(self, step: Step, name: str) -> Tensor:
        weight = wide(step.parameters[name])
        if (
            not weight.isfinite().all()
        ):  # it has no singular values: the choice says whose score is not finite
            return weight.abs()
        return truncated(weight, self.rank).abs()


def truncated(weight: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank of a weight as a matrix, in the weight's shape; a vector as it is."""
    if weight.dim() < 2 or not weight.numel():
        return weight
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    found: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return found.view(weight.shape)


@dataclass(frozen=True)
class Alpha:
    """The alpha of a weight, the mean of those of its matrices, for each of its entries; 0 where it has none."""

    measure: Alphas

    def __call__(self, step: Step, name: str) -> Tensor:
        weight = wide(step.parameters[name])
        finite = [alpha for alpha in self.measure([name])[name] if math.isfinite(alpha)]
        return weight.new_tensor(fmean(finite) if finite else 0.0).expand_as(weight)


@dataclass(frozen=True)
class Random:
    """Uniform numbers, from a stream for each parameter and step: the same on any machine, in any process."""

    seed: int

    def __call__(self, step: Step, name: str) -> Tensor:
        weight = step.parameters[name]
        made = torch.Generator().manual_seed(derive_seed(self.seed, "mask", name, step.clock.steps))
        return torch.rand(weight.shape, generator=made).to(weight.device)


class SummedScores:
    """Scores that are summed over steps: of each, a function of a weight and its gradient, in float32 at least."""

    def __init__(
        self,
        of: Callable[[Tensor, Tensor], Tensor],
        final: Callable[[Tensor], Tensor],
        *,
        real: bool = False,
    ) -> None:
        self._of, self._final, self._real = of, final, real
        self.sums: dict[str, Tensor] = {}

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of the sums for a weight; that of `real` scores is real where the weight is complex."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return dtype.to_real() if self._real else dtype

    def add(self, step: Step, gradients: Mapping[str, Tensor]) -> None:
        """Add what the gradients of a step say of the entries."""
        for name, gradient in gradients.items():
            self.sums[name] = self._sum_with(name, self.of(step, name, gradient))

    def of(self, step: Step, name: str, gradient: Tensor) -> Tensor:
        """Return what the gradient of a step says of the entries, by the weights of now."""
        return self._of(wide(step.parameters[name]), wide(gradient))

    def add_found(self, name: str, found: Tensor) -> None:
        """Add what `of` returned."""
        self.sums[name] = self._sum_with(name, found)

    def with_last(self, name: str, found: Tensor) -> Tensor:
        """Return what `take` would if what `of` returned were added, which it is not."""
        return self._final(self._sum_with(name, found))

    def _sum_with(self, name: str, found: Tensor) -> Tensor:
        return self.sums[name] + found if name in self.sums else found

    def so_far(self, step: Step, name: str) -> Tensor:
        """Return the score of a parameter's entries; zeros where it had no gradient."""
        if name not in self.sums:
            weight = step.parameters[name]
            return torch.zeros_like(weight, dtype=self.dtype_of(weight))
        return self._final(self.sums[name])

    def take(self, step: Step, name: str) -> Tensor:
        """Return the score of a parameter's entries, and forget its sum."""
        found = self.so_far(step, name)
        self.sums.pop(name, None)
        return found


def summed_gradients() -> SummedScores:
    """Return |sum of g| over steps."""
    return SummedScores(lambda weight, gradient: gradient, torch.abs)


def summed_movement() -> SummedScores:
    """Return - sum of w g over steps: positive where a weight moves away from zero.

    Of complex weights it is the sum for real and imaginary parts, real.

    Source: Sanh, Wolf and Rush, Movement Pruning, NeurIPS 2020, arXiv:2005.07683, equation 4, at rate 1.
    """
    return SummedScores(
        lambda weight, gradient: -(weight.conj() * gradient).real, lambda total: total, real=True
    )


@dataclass(frozen=True)
class ScoredChoice:
    """Chooses entries of parameters by a score: see `Lowering.mask`."""

    label: str
    names: Sequence[str]
    score: Score
    choice: Choice

    def __call__(self, step: Step, density: float) -> dict[str, Tensor] | None:
        """Return which entries are chosen, bool by parameter; None, with a note, where a score is not finite."""
        scores = {name: self.score(step, name) for name in self.names}
        broken = next((name for name, one in scores.items() if not one.isfinite().all()), None)
        if broken is not None:
            step.notes.append(not_finite(self.label, broken))
            return None
        return self.choice.masks(scores, density)


def not_finite(label: str, name: str) -> str:
    """Return the note on a score that chooses nothing."""
    return f"{label}: `{name}` has entries that are not finite, so nothing is chosen in this step"
