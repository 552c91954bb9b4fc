"""The gradient noise scale: estimators of |G|^2 and tr(Sigma), and averages of them.

G is the mean and Sigma the covariance of per-example gradients. The gradient of B examples has the
expected square |G|^2 + tr(Sigma) / B, and B_simple = tr(Sigma) / |G|^2 is counted in examples
(McCandlish et al. 2018, arXiv 1812.06162). Both parts are estimated without bias and averaged; the
ratio is one of averages, never an average of ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step import Contribution

# What float32 weights may sum to beside 1: nearer to it, one example carries the whole step.
_ONE_EXAMPLE = 1e-6


class Estimate(NamedTuple):
    """An estimate of |G|^2 (`signal`) and tr(Sigma) (`noise`), both in squared gradient units."""

    signal: float
    noise: float

    @property
    def scale(self) -> float:
        """Return tr(Sigma) / |G|^2 in examples; NaN where the signal is not above zero."""
        return self.noise / self.signal if self.signal > 0 else math.nan


UNDETERMINED = Estimate(math.nan, math.nan)


def noise_scale(s_small: float, s_big: float, b_small: float, b_big: float) -> Estimate:
    """Estimate from mean squared gradient norms at two batch sizes (McCandlish et al., app. A.1).

    signal = (b_big s_big - b_small s_small) / (b_big - b_small)
    noise  = (s_small - s_big) / (1 / b_small - 1 / b_big)
    """
    if b_big <= b_small:
        return UNDETERMINED
    signal = (b_big * s_big - b_small * s_small) / (b_big - b_small)
    return Estimate(signal, (s_small - s_big) / (1 / b_small - 1 / b_big))


def noise_scale_from_contributions(s1: float, s_big: float, q: float) -> Estimate:
    """Estimate from each example's own share c_b = w_b g_b of the gradient, sum w_b = 1.

    With s1 = sum |c_b|^2, s_big = |sum c_b|^2 and q = sum w_b^2,
    signal = (s_big - s1) / (1 - q) and noise = (s1 / q - s_big) / (1 - q).
    Equal weights give `noise_scale` at b_small = 1, unequal ones serve examples of unequal length
    under a token mean; one example tells nothing.
    """
    if not _ONE_EXAMPLE < 1 - q < 1:
        return UNDETERMINED
    return Estimate((s_big - s1) / (1 - q), (s1 / q - s_big) / (1 - q))


@dataclass(frozen=True, slots=True)
class Squares:
    """Of one step: by parameter sum |c_b|^2 (`shares`) and |sum c_b|^2 (`whole`), and q."""

    shares: Mapping[str, float]
    whole: Mapping[str, float]
    q: float

    @classmethod
    def of(cls, parts: Sequence[Contribution], gradients: Mapping[str, Tensor]) -> Squares:
        """Read the micro-batches' contributions and the gradients they sum to, in one transfer."""
        import torch

        if not parts or not gradients:
            return cls({}, {}, math.nan)
        wide = {n: torch.promote_types(g.dtype, torch.float32) for n, g in gradients.items()}
        numbers = [
            *(torch.linalg.vector_norm(g, dtype=wide[n]) for n, g in gradients.items()),
            *(torch.stack([part.squares[n].sum() for part in parts]).sum() for n in gradients),
            torch.stack([part.weights.square().sum() for part in parts]).sum(),
        ]
        *found, q = torch.stack([number.double() for number in numbers]).tolist()
        count = len(gradients)
        whole = {n: norm * norm for n, norm in zip(gradients, found[:count], strict=True)}
        return cls(dict(zip(gradients, found[count:], strict=True)), whole, q)

    def estimate(self, names: Iterable[str] | None = None) -> Estimate:
        """Return the estimate over some parameters, all by default; without gradients none."""
        chosen = [name for name in (self.whole if names is None else names) if name in self.whole]
        s1, s_big = (math.fsum(s[name] for name in chosen) for s in (self.shares, self.whole))
        return noise_scale_from_contributions(s1, s_big, self.q) if chosen else UNDETERMINED


class Averages:
    """Exponential averages of estimates, started at zero, with the sums that undo the start.

    The sums are of weight, squared weight, signal, noise, signal^2, noise^2 and signal * noise;
    from the second moments come standard errors, which take estimates for independent.
    """

    SIZE = 7

    def __init__(self) -> None:
        self._sums = [0.0] * self.SIZE

    def add(self, estimate: Estimate, decay: float) -> None:
        """Fold in a finite estimate; what was there keeps `decay` of its weight, in [0, 1)."""
        signal, noise = estimate
        fresh = 1 - decay
        new = (1.0, fresh, signal, noise, signal * signal, noise * noise, signal * noise)
        for i, value in enumerate(new):
            keep = decay * decay if i == 1 else decay
            self._sums[i] = keep * self._sums[i] + fresh * value

    @property
    def estimate(self) -> Estimate:
        """Return the averages, unbiased from the first estimate on; NaN before it."""
        weight, _, signal, noise, *_ = self._sums
        return Estimate(signal / weight, noise / weight) if weight else UNDETERMINED

    def scale(self, errors: float = 0.0) -> float:
        """Return the ratio of the averages; NaN while the signal is not `errors` errors above 0."""
        estimate = self.estimate
        if errors and not estimate.signal > errors * math.sqrt(self._variances()[0]):
            return math.nan
        return estimate.scale

    def error(self) -> float:
        """Return the ratio's standard error by the delta method; NaN before two estimates."""
        ratio = self.estimate.scale
        var_signal, var_noise, covariance = self._variances()
        variance = var_noise - 2 * ratio * covariance + ratio * ratio * var_signal
        if math.isnan(variance):
            return math.nan
        return math.sqrt(max(variance, 0.0)) / self.estimate.signal

    def _variances(self) -> tuple[float, float, float]:
        """Return variances and covariance of the averaged signal and noise; NaN before two."""
        weight, squared, signal, noise, signal2, noise2, product = self._sums
        share = squared / weight**2 if weight else 1.0
        if share > 1 - 1e-9:
            return math.nan, math.nan, math.nan
        # Bessel's correction 1 / (1 - share) for one estimate, times share for their weighted mean.
        factor = share / (1 - share)
        signal, noise = signal / weight, noise / weight
        return (
            max(signal2 / weight - signal * signal, 0.0) * factor,
            max(noise2 / weight - noise * noise, 0.0) * factor,
            (product / weight - signal * noise) * factor,
        )

    def state(self) -> list[float]:
        """Return what `load` restores, `SIZE` numbers."""
        return list(self._sums)

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` gave."""
        if len(state) != self.SIZE:
            raise ValueError(f"averages are {self.SIZE} numbers, not {len(state)}")
        self._sums = [float(value) for value in state]
