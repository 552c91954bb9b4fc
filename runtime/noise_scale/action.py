"""The noise scale of a step (phase 7): by layer and in total, averaged over steps, with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.calibration import Calibration
from trainc.runtime.noise_scale.estimate import Estimate, IntervalEstimate
from trainc.runtime.noise_scale.format import format_summary
from trainc.runtime.noise_scale.resume import match_state
from trainc.runtime.noise_scale.settings import NoiseScaleSettings
from trainc.runtime.noise_scale.step_estimates import (
    StepEstimate,
    calibration_estimates,
    step_estimates,
)
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import AnyNumber, Flag, Form, Number, Record, Text, Values

TOTAL = ""
"""The key of all measured layers together, next to those of single layers."""


class NoiseScaleAction(Action):
    """Estimates the noise scale of `measured`, the parameters by module."""

    phase = Phase.REDUCE
    reads_shards = True

    def __init__(
        self, name: str, measured: Mapping[str, tuple[str, ...]], settings: NoiseScaleSettings
    ) -> None:
        self.name = name
        self.measured = dict(measured)
        self.settings = settings
        self.total = Averages()
        self.layers = {module: Averages() for module in measured}
        self.calibration = None if settings.calibrations is None else Calibration()
        self.position = self.calibrated_at = 0.0
        self.finite = True
        """Whether the last step's gradients were."""

    def run(self, step: Step) -> None:
        names = list(dict.fromkeys(name for owned in self.measured.values() for name in owned))
        gradients = {n: g for n in names if (g := step.parameters[n].grad) is not None}
        groups = {module: [n for n in o if n in gradients] for module, o in self.measured.items()}
        groups = {TOTAL: list(gradients), **{m: owned for m, owned in groups.items() if owned}}
        self.finite = True
        if step.contributions and gradients:
            self._fold(step_estimates(step, gradients, groups, self.settings), step)
        sample = step.calibrations.get(self.name)
        if sample is not None and self.calibration is not None:
            self._calibrate(self.calibration, *calibration_estimates(sample, names), step)
        self._record(step)

    # one step

    def _fold(self, found: Mapping[str, StepEstimate] | None, step: Step) -> None:
        """Add a step's estimates to the averages; those that are not finite are only counted."""
        if found is None:
            self.total.skip("single")
            return
        if TOTAL not in found:
            return
        estimate, uncertainty = found[TOTAL]
        if not all(map(math.isfinite, estimate)):
            self.total.skip("not finite")
            self.finite = False
            return
        decay = 0.5 ** (self._elapsed(step) / self.settings.half_life)
        self.total.add(estimate, decay, uncertainty)
        for module, averages in self.layers.items():
            if module in found:
                averages.add(found[module][0], decay, found[module][1])

    def _elapsed(self, step: Step) -> float:
        """Return how much of the run passed since the last estimate, with this step."""
        before, (self.position, now) = self.position, self._position_after(step)
        return max(self.position - before, now) if self.total.estimates else now

    def _position_after(self, step: Step) -> tuple[float, float]:
        """Return the clock's position after a step, and by how much the step moves the clock."""
        now = {"steps": 1, "samples": step.samples, "tokens": step.tokens}[self.settings.unit]
        return float(getattr(step.clock, self.settings.unit) + now), float(now)

    def _calibrate(
        self, calibration: Calibration, measured: Estimate, whole_model: Estimate, step: Step
    ) -> None:
        """Add a calibration, with the decay of the averages over the time since the last calibration.

        Where calibrations are far apart for `smooth`, they decay with their own half-life. The first stands for its
        step alone, as in the noise scale: it differs much from all that follow.
        """
        before, (reached, now) = self.calibrated_at, self._position_after(step)
        assert self.settings.calibrations is not None
        decay = 0.5 ** (now / self.settings.half_life)
        if calibration.count:
            decay = 0.5 ** (max(reached - before, now) / self.settings.half_life)
            decay = max(decay, 0.5 ** (1 / self.settings.calibrations))
        calibration.add(measured, whole_model, decay)
        if all(map(math.isfinite, (*measured, *whole_model))):
            self.calibrated_at = reached

    # what is recorded

    def interval_estimate(self) -> IntervalEstimate:
        """Return the noise scale of all measured layers, or why it is undetermined."""
        s = self.settings
        return self.total.interval_estimate(s.level, s.errors, s.examples, s.single_reason)

    def whole_model(self) -> IntervalEstimate:
        """Return the noise scale of the whole model as the calibration predicts it."""
        if self.calibration is None:
            return IntervalEstimate(math.nan, reason="no calibration")
        error = self.total.standard_error()
        error = 0.0 if math.isnan(error) else error
        return self.calibration.predict(self.interval_estimate().value, self.settings.level, error)

    def _record(self, step: Step) -> None:
        """Write signals, metrics and figures per layer; NaN for a step whose gradients were not finite."""
        s = self.settings
        found = self._totals()
        if self.calibration is not None and self.name in step.calibrations:
            step.metrics.update(self._calibration_metrics(self.calibration))
        rows = {
            name: (a.noise_scale(s.errors), *a.estimate, *a.interval(s.level))
            for name, a in self.layers.items()
        }
        if not self.finite:
            found = dict.fromkeys(found, math.nan)
            rows = dict.fromkeys(rows, (math.nan,) * 5)
        step.signals.update(found)
        step.metrics.update(found)
        for i, suffix in enumerate(("", ".signal", ".noise", ".low", ".high")):
            step.series[f"{self.name}{suffix}"] = {name: row[i] for name, row in rows.items()}

    def _totals(self) -> dict[str, float]:
        """Return the figures of all measured layers together, and of the whole model where it is calibrated."""
        found, (signal, noise) = self.interval_estimate(), self.total.estimate
        totals = {
            self.name: found.value,
            f"{self.name}.signal": signal,
            f"{self.name}.noise": noise,
            f"{self.name}.error": self.total.standard_error(),
            f"{self.name}.low": found.low,
            f"{self.name}.high": found.high,
        }
        if self.calibration is not None:
            whole_model = self.whole_model()
            totals[f"{self.name}.total"] = whole_model.value
            totals[f"{self.name}.total_low"] = whole_model.low
            totals[f"{self.name}.total_high"] = whole_model.high
            totals[f"{self.name}.slope"] = self.calibration.slope(self.settings.level).value
        return totals

    def _calibration_metrics(self, calibration: Calibration) -> dict[str, float]:
        """Return what one calibration adds: its point of the regression, and the slope's interval."""
        slope = calibration.slope(self.settings.level)
        return {
            f"{self.name}.point": calibration.measured.noise_scale(),
            f"{self.name}.point_total": calibration.whole_model.noise_scale(),
            f"{self.name}.slope_low": slope.low,
            f"{self.name}.slope_high": slope.high,
        }

    def summary(self) -> str | None:
        return format_summary(self)

    # state

    def state_dict(self) -> ActionState:
        if not (self.position or self.total.steps):
            return {}
        state: ActionState = {
            name: getattr(self, name) for name in ("position", "calibrated_at", "finite")
        }
        state |= {"unit": self.settings.unit, "quantity": self.settings.quantity}
        for name, averages in self.averages().items():
            state[name] = torch.tensor(averages.state(), dtype=torch.float64)
        return state

    def state_form(self) -> Form:
        entries: dict[str, Form] = {"position": Number(0), "calibrated_at": AnyNumber()}
        entries |= {"finite": Flag(), "unit": Text([self.settings.unit]), "quantity": Text()}
        return Record(entries, more=Values([None], "float64"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kept, changes = self._match(state)
        if state and changes:
            raise ValueError(
                f"{self.name}: the checkpoint has measurements of another clause: {changes}"
            )
        self._load(state, kept)

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        kept, changes = self._match(state)
        self._load(state, kept)
        return f"{self.name}: {changes}" if state and changes else None

    def _match(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        sizes = {name: averages.SIZE for name, averages in self.averages().items()}
        return match_state(state, sizes, self.settings.quantity)

    def _load(self, state: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        """Restore the averages that still hold, and their position on the clock."""
        self.position, self.calibrated_at = (
            # Of another unit: before any position there is, so that only the step itself has passed.
            float(state.get(name, 0.0))
            if state.get("unit") in (None, self.settings.unit)
            else math.inf
            for name in ("position", "calibrated_at")
        )
        self.finite = bool(state.get("finite", True))
        for name, averages in self.averages().items():
            averages.load(kept[name].tolist() if name in kept else [0.0] * averages.SIZE)

    def averages(self) -> dict[str, Averages | Calibration]:
        """Return all averages under the names that a checkpoint has them under."""
        found: dict[str, Averages | Calibration] = {"total": self.total}
        found |= {f"layer/{name}": a for name, a in self.layers.items()}
        return found if self.calibration is None else found | {"calibration": self.calibration}
