"""The gradient noise scale: unbiased estimators of |G|^2 and tr(Sigma) from squared norms.

G is the mean and Sigma the covariance of per-example gradients. The gradient of B examples has the
expected square |G|^2 + tr(Sigma) / B, and B_simple = tr(Sigma) / |G|^2 is counted in examples
(McCandlish et al. 2018, arXiv 1812.06162). Both parts are estimated without bias and averaged
(`averages.py`); the ratio is one of averages, never an average of ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.estimate import ROUNDING, UNDETERMINED, Estimate, Reading, Spread

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Contribution

__all__ = [
    "UNDETERMINED",
    "Averages",
    "Estimate",
    "Reading",
    "Spread",
    "Squares",
    "noise_scale",
    "noise_scale_from_contributions",
]


def noise_scale(s_small: float, s_big: float, b_small: float, b_big: float) -> Estimate:
    """Estimate |G|^2 and tr(Sigma) from squared gradient norms at two batch sizes.

    `s_small` and `s_big` are means of |g|^2 over gradients g that are means over `b_small` and `b_big` examples each:

        signal = (b_big s_big - b_small s_small) / (b_big - b_small)
        noise  = (s_small - s_big) / (1 / b_small - 1 / b_big)

    Returns Estimate(signal, noise), unbiased, in squared units of the gradient. Its `scale` is noise / signal in
    examples, NaN unless both are above zero; over many steps average signal and noise, never scales. UNDETERMINED, both
    NaN, where b_big = b_small. Raises ValueError unless sizes are finite, above zero, and b_small no larger than b_big.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    if not 0 < b_small <= b_big < math.inf:
        raise ValueError(
            f"b_small = {b_small:g}, b_big = {b_big:g}: batch sizes are finite and above zero, the "
            "small one no larger than the big one"
        )
    if b_big == b_small:
        return UNDETERMINED
    signal = (b_big * s_big - b_small * s_small) / (b_big - b_small)
    return Estimate(signal, (s_small - s_big) / (1 / b_small - 1 / b_big))


def noise_scale_from_contributions(
    s1: float, s_big: float, q: float, q_examples: float | None = None
) -> Estimate:
    """Estimate |G|^2 and tr(Sigma) from the shares c_g = sum over b in g of w_b g_b that groups have in the gradient.

    `s1` is sum |c_g|^2 and `s_big` |sum c_g|^2. With w_g the weight of a group, all weights summing to 1, `q` is sum
    w_g^2 over groups and `q_examples` sum w_b^2 over examples, None where groups are single examples. As examples are
    independent, inside groups and between them,

        E s1    = q |G|^2 + q_examples tr(Sigma)        signal = (s_big - s1) / (1 - q)
        E s_big =   |G|^2 + q_examples tr(Sigma)        noise  = (s1 - q signal) / q_examples

    Groups are micro-batches, replicas, ghost batches, or single examples: noise = (s1 / q - s_big) / (1 - q), for equal
    weights `noise_scale` at b_small = 1. Unequal weights serve examples of unequal length under a token mean. The
    variance of an example's gradient is taken not to depend on its weight.

    Returns Estimate(signal, noise), in squared units of the gradient, as `noise_scale` does; UNDETERMINED, both NaN,
    where q is 1, as one group tells nothing, 0 or NaN, or q_examples is NaN. Raises ValueError for a q outside [0, 1],
    and for a q_examples that is not above zero, or above q.

    Source: McCandlish et al. 2018, arXiv:1812.06162, with weights for batch sizes.
    """
    if q < 0 or q > 1 + ROUNDING:
        raise ValueError(
            f"q = {q:g}: weights that sum to 1 have a sum of squares from 0 to 1, of a single "
            "group; give sum w_g^2 of weights divided by their sum"
        )
    if not ROUNDING < 1 - q < 1:
        return UNDETERMINED
    examples = q if q_examples is None else q_examples
    if math.isnan(examples):
        return UNDETERMINED
    if not 0 < examples <= q * (1 + ROUNDING):
        raise ValueError(
            f"q_examples = {examples:g} with q = {q:g} over groups: a group's squared weight is no "
            "less than the sum of its examples'; give sum w_b^2 over single examples, above zero"
        )
    noise = (s1 / examples - (q / examples) * s_big) / (1 - q)
    return Estimate((s_big - s1) / (1 - q), noise)


@dataclass(frozen=True, slots=True)
class Squares:
    """Of one step: by parameter sum |c|^2 (`shares`) and |sum c|^2 (`whole`), and q = sum w^2.

    Contributions are of examples, or of groups with `q_examples` = sum w_b^2 over single examples.
    """

    shares: Mapping[str, float]
    whole: Mapping[str, float]
    q: float
    q_examples: float | None = None

    @classmethod
    def of(
        cls,
        parts: Sequence[Contribution],
        gradients: Mapping[str, Tensor],
        examples: Sequence[Tensor] | None = None,
    ) -> Squares:
        """Read the micro-batches' contributions and the gradients they sum to, in one transfer.

        `examples` are the weights of single examples where contributions are of groups: one tensor
        (examples,) a micro-batch.
        """
        import torch

        from trainc.runtime.step.sharded import squared_norms

        if not parts or not gradients:
            return cls({}, {}, math.nan)
        weights = [[part.weights for part in parts], *([] if examples is None else [examples])]
        sums = [
            *(torch.cat([part.squares[n] for part in parts]).sum() for n in gradients),
            *(torch.cat(list(some)).square().sum() for some in weights),
        ]
        numbers = [squared_norms(list(gradients.values())), torch.stack([s.double() for s in sums])]
        found = torch.cat(numbers).tolist()
        count = len(gradients)
        whole = dict(zip(gradients, found[:count], strict=True))
        shares = dict(zip(gradients, found[count : 2 * count], strict=True))
        return cls(shares, whole, *found[2 * count :])

    @classmethod
    def of_groups(cls, parts: Sequence[Contribution], gradients: Mapping[str, Tensor]) -> Squares:
        """Read each micro-batch as one contribution, from the squared norms in its `whole`."""
        from trainc.runtime.step.record import Contribution

        groups = [
            Contribution(
                part.weights.sum().reshape(1), {n: part.whole[n].reshape(1) for n in gradients}
            )
            for part in parts
        ]
        return cls.of(groups, gradients, [part.weights for part in parts])

    @property
    def alone(self) -> bool:
        """Return whether one example or group carries the whole step: nothing to compare."""
        return not 1 - self.q > ROUNDING and not math.isnan(self.q)

    def estimate(self, names: Iterable[str] | None = None) -> Estimate:
        """Return the estimate over some parameters, all by default; without gradients none."""
        chosen = [name for name in (self.whole if names is None else names) if name in self.whole]
        if not chosen:
            return UNDETERMINED
        s1, s_big = (math.fsum(s[name] for name in chosen) for s in (self.shares, self.whole))
        return noise_scale_from_contributions(s1, s_big, self.q, self.q_examples)
