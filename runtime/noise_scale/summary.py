"""The summary line of a noise scale: its value at the end of the run, or why it is undetermined."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainc.runtime.noise_scale.action import NoiseScaleAction
    from trainc.runtime.noise_scale.calibration import Calibration


def summary_line(action: NoiseScaleAction) -> str:
    """Return the noise scale with its interval, its two parts, and what the calibration says of the whole model."""
    settings, found, (signal, noise) = (
        action.settings,
        action.interval_estimate(),
        action.total.estimate,
    )
    line = f"{action.name}: undetermined, {found.reason}"
    if not math.isnan(found.value):
        line = f"{action.name}: noise scale {found.value:.4g} {settings.examples}"
        if not math.isnan(found.low):
            line += f" ({settings.level:.0%} interval {found.low:.3g} to {found.high:.3g})"
    if not math.isnan(signal):
        layers = len(action.layers)
        line += (
            f", |G|^2 {signal:.3g}, tr(Sigma) {noise:.3g} over {layers} layer{'s' * (layers != 1)}"
        )
        line += _describe_non_finite(action)
    if action.calibration is not None:
        line += f"; whole model: {_describe_calibration(action.calibration, settings.level)}"
    return line


def _describe_non_finite(action: NoiseScaleAction) -> str:
    """Return how many steps have no estimate because their gradients were not finite."""
    count, steps = action.total.non_finite_steps, action.total.steps
    if not count:
        return ""
    last = "" if action.finite else ", the last one among them: these numbers are from before it"
    return f"; gradients were not finite in {count} of {steps} steps{last}"


def _describe_calibration(calibration: Calibration, level: float) -> str:
    slope = calibration.slope(level)
    if math.isnan(slope.value):
        least = f", at least {slope.low:.3g} times that" if slope.low > 0 else ""
        return f"undetermined, {slope.reason}{least}"
    return (
        f"{slope.value:.3g} times that ({slope.low:.3g} to {slope.high:.3g}),"
        f" correlation {calibration.correlation:.2f} over {calibration.count} calibrations"
    )
