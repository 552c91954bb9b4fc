"""Noise scales as text: short for the display and tables, one line for the summary of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainc.runtime.report.number_text import format_interval, format_number

if TYPE_CHECKING:
    from trainc.runtime.noise_scale.action import NoiseScaleAction
    from trainc.runtime.noise_scale.calibration import Calibration


def format_noise_scale(record: Mapping[str, Any], label: str) -> str:
    """Return a step's noise scale as short text: `142 [98, 210]`, or `?` with the reason and a known bound."""
    scale, low, high = (
        record.get(name, math.nan) for name in (label, f"{label}.low", f"{label}.high")
    )
    if math.isfinite(scale):
        return format_interval(scale, low, high)
    signal, noise = (record.get(f"{label}.{part}", math.nan) for part in ("signal", "noise"))
    if math.isnan(signal):
        return "? no estimate"
    if signal > 0 and not noise > 0:
        return "? tr(Sigma) <= 0" + (f", < {format_number(high)}" if 0 < high < math.inf else "")
    why = "|G|^2 uncertain" if signal > 0 else "|G|^2 <= 0"
    return f"? {why}" + (f", > {format_number(low)}" if 0 < low < math.inf else "")


def format_whole_model(record: Mapping[str, Any], label: str) -> str | None:
    """Return the whole model's noise scale as short text; None without calibration."""
    name = f"{label}.total"
    if name not in record:
        return None
    scale = record[name]
    if math.isfinite(scale):
        low, high = (record.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
        return format_interval(scale, low, high)
    if not math.isnan(record.get(f"{label}.slope", math.nan)):
        return "?"
    low = record.get(f"{name}_low", math.nan)
    if math.isnan(low):
        return "? no calibration"
    return "? calibration uncertain" + (f", > {format_number(low)}" if low > 0 else "")


def format_summary(action: NoiseScaleAction) -> str:
    """Return the noise scale with its interval, its two parts, and the calibration's result for the whole model."""
    settings, found = action.settings, action.interval_estimate()
    signal, noise = action.total.estimate
    line = f"{action.name}: undetermined, {found.reason}"
    if not math.isnan(found.value):
        line = f"{action.name}: noise scale {found.value:.4g} {settings.examples}"
        if not math.isnan(found.low):
            line += f" ({settings.level:.0%} interval {found.low:.3g} to {found.high:.3g})"
    if not math.isnan(signal):
        layers = f"{len(action.layers)} layer{'s' * (len(action.layers) != 1)}"
        line += f", |G|^2 {signal:.3g}, tr(Sigma) {noise:.3g} over {layers}"
        line += _describe_non_finite(action)
    if action.calibration is not None:
        line += f"; whole model: {_describe_calibration(action.calibration, settings.level)}"
    return line


def _describe_non_finite(action: NoiseScaleAction) -> str:
    """Return how many steps have no estimate because their gradients were not finite."""
    count, steps = action.total.non_finite_steps, action.total.steps
    if not count:
        return ""
    last = (
        "" if action.finite else ", also in the last one: these numbers are from the steps before"
    )
    return f"; gradients were not finite in {count} of {steps} steps{last}"


def _describe_calibration(calibration: Calibration, level: float) -> str:
    slope = calibration.slope(level)
    if math.isnan(slope.value):
        least = f", at least {slope.low:.3g} times this noise scale" if slope.low > 0 else ""
        return f"undetermined, {slope.reason}{least}"
    return (
        f"{slope.value:.3g} times this noise scale ({slope.low:.3g} to {slope.high:.3g}),"
        f" correlation {calibration.correlation:.2f} over {calibration.count} calibrations"
    )
