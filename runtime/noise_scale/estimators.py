"""Unbiased estimators of |G|^2 and tr(Sigma) from squared norms of gradients.

G is the mean and Sigma the covariance of per-example gradients. The gradient of B examples has the
expected square |G|^2 + tr(Sigma) / B, and B_simple = tr(Sigma) / |G|^2 is counted in examples
(McCandlish et al. 2018, arXiv 1812.06162). Both parts are estimated without bias and averaged
(`averages.py`); the noise scale is the ratio of the averages, never an average of ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainc.runtime.noise_scale.estimate import ROUNDING, UNDETERMINED, Estimate
from trainc.runtime.step.record import Contribution


def noise_scale(
    small_sq_norm: float, big_sq_norm: float, small_batch: float, big_batch: float
) -> Estimate:
    """Estimate |G|^2 and tr(Sigma) from squared gradient norms at two batch sizes.

    `small_sq_norm` and `big_sq_norm` are means of |g|^2 over gradients g that are means over `small_batch` and
    `big_batch` examples each: |G_small|^2, |G_big|^2, B_small and B_big of the paper.

        signal = (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small)
        noise  = (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big)

    Returns Estimate(signal, noise), unbiased, in squared units of the gradient. Its `noise_scale` is noise / signal in
    examples, NaN unless both are above zero; over many steps average signal and noise, never ratios. UNDETERMINED, both
    NaN, where the two sizes are equal. Raises ValueError unless sizes are finite and above zero, the
    small one at most the big one.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    if not 0 < small_batch <= big_batch < math.inf:
        raise ValueError(
            f"small_batch = {small_batch:g}, big_batch = {big_batch:g}: expected finite batch sizes"
            " above zero, the small one no larger than the big one"
        )
    if big_batch == small_batch:
        return UNDETERMINED
    signal = (big_batch * big_sq_norm - small_batch * small_sq_norm) / (big_batch - small_batch)
    return Estimate(signal, (small_sq_norm - big_sq_norm) / (1 / small_batch - 1 / big_batch))


def noise_scale_from_contributions(
    sum_sq_norms: float,
    batch_sq_norm: float,
    sum_sq_weights: float,
    sum_sq_example_weights: float | None = None,
) -> Estimate:
    """Estimate |G|^2 and tr(Sigma) from what groups of examples contribute to one gradient.

    Group g contributes c_g = sum over its examples b of w_b g_b, and the gradient is sum c_g. `sum_sq_norms` is
    S1 = sum |c_g|^2 and `batch_sq_norm` S = |sum c_g|^2. With w_g the weight of a group, all weights summing to 1,
    `sum_sq_weights` is q = sum w_g^2 over groups and `sum_sq_example_weights` e = sum w_b^2 over examples, None where
    groups are single examples. As examples are independent, inside groups and between them,

        E S1 = q |G|^2 + e tr(Sigma)        signal = (S - S1) / (1 - q)
        E S  =   |G|^2 + e tr(Sigma)        noise  = (S1 - q signal) / e

    Groups are micro-batches, replicas, ghost batches, or single examples: then noise = (S1 / q - S) / (1 - q), for
    equal weights `noise_scale` at a small batch of 1. Unequal weights serve examples of unequal length under a token
    mean. The variance of an example's gradient is taken not to depend on its weight.

    Returns Estimate(signal, noise), in squared units of the gradient, as `noise_scale` does; UNDETERMINED, both NaN,
    where q is 1 (a single group), 0 or NaN, or e is NaN. Raises ValueError for a q outside [0, 1], and for an e that is
    not above zero, or above q.

    Source: McCandlish et al. 2018, arXiv:1812.06162, with weights for batch sizes.
    """
    q = sum_sq_weights
    if q < 0 or q > 1 + ROUNDING:
        raise ValueError(
            f"sum_sq_weights = {q:g}: expected a number in [0, 1]; give the sum of w_g^2 with weights"
            " divided by their sum"
        )
    if not ROUNDING < 1 - q < 1:
        return UNDETERMINED
    examples = q if sum_sq_example_weights is None else sum_sq_example_weights
    if math.isnan(examples):
        return UNDETERMINED
    if not 0 < examples <= q * (1 + ROUNDING):
        raise ValueError(
            f"sum_sq_example_weights = {examples:g}: expected a number above zero and at most"
            f" sum_sq_weights = {q:g}; give the sum of w_b^2 over single examples"
        )
    noise = (sum_sq_norms / examples - (q / examples) * batch_sq_norm) / (1 - q)
    return Estimate((batch_sq_norm - sum_sq_norms) / (1 - q), noise)


@dataclass(frozen=True, slots=True)
class SquaredNorms:
    """The squared norms of one step, by parameter: `sums` of |c|^2 over contributions c, and `batch` |sum c|^2.

    `sum_sq_weights` is that of the contributions; where these are of groups, `sum_sq_example_weights` is that of
    single examples.
    """

    sums: Mapping[str, float]
    batch: Mapping[str, float]
    sum_sq_weights: float
    sum_sq_example_weights: float | None = None

    @classmethod
    def of(
        cls,
        contributions: Sequence[Contribution],
        gradients: Mapping[str, Tensor],
        example_weights: Sequence[Tensor] | None = None,
    ) -> SquaredNorms:
        """Read the micro-batches' contributions and the gradients they sum to, in one transfer.

        `example_weights` are the weights of single examples where contributions are of groups: one
        tensor (examples,) a micro-batch.
        """
        from trainc.runtime.processes.sharded import squared_norms

        if not contributions or not gradients:
            return cls({}, {}, math.nan)
        weights = [[one.weights for one in contributions]]
        weights += [] if example_weights is None else [list(example_weights)]
        sums = [
            *(torch.cat([one.sq_norms[n] for one in contributions]).sum() for n in gradients),
            *(torch.cat(some).square().sum() for some in weights),
        ]
        numbers = [squared_norms(list(gradients.values())), torch.stack([s.double() for s in sums])]
        found = torch.cat(numbers).tolist()
        count = len(gradients)
        batch = dict(zip(gradients, found[:count], strict=True))
        sums_by_name = dict(zip(gradients, found[count : 2 * count], strict=True))
        return cls(sums_by_name, batch, *found[2 * count :])

    @classmethod
    def of_micro_batches(
        cls, contributions: Sequence[Contribution], gradients: Mapping[str, Tensor]
    ) -> SquaredNorms:
        """Read each micro-batch as one contribution, from its `batch_sq_norms`."""
        groups = [
            Contribution(
                one.weights.sum().reshape(1),
                {n: one.batch_sq_norms[n].reshape(1) for n in gradients},
            )
            for one in contributions
        ]
        return cls.of(groups, gradients, [one.weights for one in contributions])

    @property
    def single(self) -> bool:
        """Return whether the step has a single example or group, so that there is no estimate."""
        return not 1 - self.sum_sq_weights > ROUNDING and not math.isnan(self.sum_sq_weights)

    def estimate(self, names: Iterable[str] | None = None) -> Estimate:
        """Return the estimate over some parameters, all by default; UNDETERMINED where none has a gradient."""
        chosen = [name for name in (self.batch if names is None else names) if name in self.batch]
        if not chosen:
            return UNDETERMINED
        sum_sq_norms, batch_sq_norm = (
            math.fsum(by_name[name] for name in chosen) for by_name in (self.sums, self.batch)
        )
        return noise_scale_from_contributions(
            sum_sq_norms, batch_sq_norm, self.sum_sq_weights, self.sum_sq_example_weights
        )
