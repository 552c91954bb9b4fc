"""Runs whose two noise scales are known: Gaussian gradients, all steps measured at the norms, a few at all layers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.calibration import Calibration
from trainc.runtime.noise_scale.estimate import Estimate, IntervalEstimate

NORMS, REST = 20, 100
"""Weights of the norm layers, and all others, each with noise of variance 1."""
Squares = Callable[[float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ended with: the prediction, the slope, and the noise scales over the window, as they are in truth."""

    total: IntervalEstimate
    slope: IntervalEstimate
    true_total: float
    true_norms: float

    @property
    def held(self) -> bool:
        """Whether the interval holds the truth; an unbounded one that has a lower end may do so, too."""
        return self.total.low <= self.true_total <= self.total.high


def estimated(
    generator: np.random.Generator, square: float, size: int, batch: int
) -> tuple[float, float]:
    """Return the estimates of |G|^2 and tr(Sigma) from the gradients of a batch over `size` weights."""
    mean = generator.normal(size=size) / math.sqrt(batch)
    mean[0] += math.sqrt(square)
    noise = generator.chisquare((batch - 1) * size) / (batch - 1)
    return float(mean @ mean - noise / batch), float(noise)


def simulate(
    squares: Squares,
    seed: int,
    steps: int = 240,
    half_life: float = 40.0,
    every: int = 2,
    of: int = 16,
) -> Outcome:
    """Run with |G|^2 of the norms and of all others as functions of the part of the run that has passed."""
    generator = np.random.default_rng(seed)
    norms, calibration = Averages(), Calibration()
    truth: NDArray[np.float64] = np.zeros(4)
    decay = 0.5 ** (1 / half_life)
    for step in range(steps):
        own, rest = squares(step / steps)
        truth = decay * truth + np.array([own, NORMS, own + rest, NORMS + REST])
        norms.add(Estimate(*estimated(generator, own, NORMS, 32)), decay)
        if step % every == 0:
            x = estimated(generator, own, NORMS, of)
            y = estimated(generator, rest, REST, of)
            passed = decay if step == 0 else decay**every
            calibration.add(Estimate(*x), Estimate(x[0] + y[0], x[1] + y[1]), passed)
    scale, error = norms.noise_scale(), norms.standard_error()
    total, slope = calibration.predict(scale, 0.9, error), calibration.slope(0.9)
    return Outcome(total, slope, float(truth[3] / truth[2]), float(truth[1] / truth[0]))
