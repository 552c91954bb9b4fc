"""Phase 7 of a step: its noise scale, by layer and in total, averaged over steps and told with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.calibration import Calibration
from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate, Reading, Spread
from trainc.runtime.noise_scale.estimators import Squares
from trainc.runtime.noise_scale.resume import fitting
from trainc.runtime.step.action import Action, Phase, State

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Calibrated, Contribution, Step

Unit = Literal["steps", "samples", "tokens"]
Method = Literal["per_example", "micro_batch", "replica", "ghost"]
Geometry = Literal["euclidean", "adam", "sign"]
Found = tuple[Estimate, Spread | None]

TOTAL = ""
"""The key of all measured layers together beside those of single ones."""

LONE: Mapping[Method, str] = {
    "per_example": "one example a step: nothing to compare; give a step two {counts} or more",
    "micro_batch": "one micro-batch a step: nothing to compare; let `batch` be two of `micro` or more",
    "replica": "one replica: nothing to compare; train on two or more, or take `method = micro_batch`",
    "ghost": "one group a step: nothing to compare; let `batch` be two of `group` or more",
}
"""Why a step told nothing, by what is compared."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a noise scale is taken.

    `half_life` of the averages is in `unit`; a calibration's is no shorter, and at least `calibrations` of its kind
    (None: there is none). `errors` is how many standard errors the signal must be above zero, `level` the probability
    of intervals, `counts` the word for what an example is.
    """

    half_life: float
    unit: Unit
    errors: float = 0.0
    level: float = 0.9
    method: Method = "per_example"
    geometry: Geometry = "euclidean"
    jackknife: bool = False
    calibrations: float | None = None
    counts: str = "samples"

    @property
    def what(self) -> str:
        """Return what the figures are of: averages of anything else are other numbers."""
        return f"{self.counts} in {self.geometry} geometry"


class Measure(Action):
    """Estimates from `measured`, the parameters by module."""

    phase = Phase.REDUCE

    def __init__(
        self, name: str, measured: Mapping[str, tuple[str, ...]], settings: Settings
    ) -> None:
        self.name = name
        self.measured = dict(measured)
        self.settings = settings
        self.total = Averages()
        self.layers = {module: Averages() for module in measured}
        self.calibration = None if settings.calibrations is None else Calibration()
        self.position = self.calibrated = 0.0
        self.finite = True
        """Whether the last step's gradients were."""

    def run(self, step: Step) -> None:
        names = list(dict.fromkeys(name for owned in self.measured.values() for name in owned))
        gradients = {n: g for n in names if (g := step.parameters[n].grad) is not None}
        groups = {module: [n for n in o if n in gradients] for module, o in self.measured.items()}
        groups = {TOTAL: list(gradients), **{m: owned for m, owned in groups.items() if owned}}
        self.finite = True
        if step.contributions and gradients:
            self._fold(self._estimates(step, gradients, groups), step)
        if (found := step.calibrations.get(self.name)) is not None and self.calibration is not None:
            self._calibrate(self.calibration, _calibrated(found, names), step)
        self._tell(step)

    # one step

    def _estimates(
        self,
        step: Step,
        gradients: Mapping[str, Tensor],
        groups: Mapping[str, Sequence[str]],
    ) -> dict[str, Found] | None:
        """Return the estimates of a step by group of parameters; None where it had nothing to compare."""
        parts, settings = step.contributions, self.settings
        if settings.jackknife or settings.geometry != "euclidean":
            from trainc.runtime.noise_scale.per_example import Rows

            return Rows.of(step, gradients, settings.geometry).estimates(groups, settings.jackknife)
        if settings.method == "replica":
            parts = _one_each(parts)
        if settings.method in ("micro_batch", "replica"):
            squares = Squares.of_groups(parts, gradients)
        else:
            examples = [p.examples for p in parts if p.examples is not None]
            squares = Squares.of(parts, gradients, examples or None)
        if squares.alone:
            return None
        return {key: (squares.estimate(names), None) for key, names in groups.items()}

    def _fold(self, found: Mapping[str, Found] | None, step: Step) -> None:
        """Add a step's estimates to the averages; those that are not finite are only counted."""
        if found is None:
            self.total.skip("alone")
            return
        if TOTAL not in found:
            return
        estimate, spread = found[TOTAL]
        if not all(map(math.isfinite, estimate)):
            self.total.skip("not finite")
            self.finite = False
            return
        decay = 0.5 ** (self._elapsed(step) / self.settings.half_life)
        self.total.add(estimate, decay, spread)
        for module, averages in self.layers.items():
            if module in found:
                averages.add(found[module][0], decay, found[module][1])

    def _elapsed(self, step: Step) -> float:
        """Return what passed since the last estimate, this step included."""
        before, (self.position, now) = self.position, self._reached(step)
        return max(self.position - before, now) if self.total.estimates else now

    def _reached(self, step: Step) -> tuple[float, float]:
        """Return where the clock will stand after a step, and the step's part of it."""
        now = {"steps": 1, "samples": step.samples, "tokens": step.tokens}[self.settings.unit]
        return float(getattr(step.clock, self.settings.unit) + now), float(now)

    def _calibrate(
        self, calibration: Calibration, found: tuple[Estimate, Estimate], step: Step
    ) -> None:
        """Fold in a calibration with the weight that the noise scale gives to what passed since the last one.

        Where calibrations are far apart for `smooth`, they fade with their own half-life. The first stands for its
        step alone, as in the noise scale: it is far from all that follows.
        """
        before, (reached, now) = self.calibrated, self._reached(step)
        assert self.settings.calibrations is not None
        decay = 0.5 ** (now / self.settings.half_life)
        if calibration.points:
            decay = 0.5 ** (max(reached - before, now) / self.settings.half_life)
            decay = max(decay, 0.5 ** (1 / self.settings.calibrations))
        calibration.add(*found, decay)
        if all(map(math.isfinite, (*found[0], *found[1]))):
            self.calibrated = reached

    # what is told

    def reading(self) -> Reading:
        """Return the noise scale of all measured layers, or why there is none."""
        s = self.settings
        lone = LONE[s.method].format(counts=s.counts)
        return self.total.reading(s.level, s.errors, s.counts, lone)

    def whole(self) -> Reading:
        """Return the noise scale of the whole model as the calibration predicts it."""
        if self.calibration is None:
            return Reading(math.nan, reason="no calibration")
        error = self.total.error()
        return self.calibration.predict(
            self.reading().scale, self.settings.level, 0.0 if math.isnan(error) else error
        )

    def _tell(self, step: Step) -> None:
        """Write down what is known; nothing is of a step whose gradients were not finite."""
        s = self.settings
        reading, (signal, noise) = self.reading(), self.total.estimate
        found = {
            self.name: reading.scale,
            f"{self.name}.signal": signal,
            f"{self.name}.noise": noise,
            f"{self.name}.error": self.total.error(),
            f"{self.name}.low": reading.low,
            f"{self.name}.high": reading.high,
        }
        if self.calibration is not None:
            whole = self.whole()
            found[f"{self.name}.total"] = whole.scale
            found[f"{self.name}.total_low"] = whole.low
            found[f"{self.name}.total_high"] = whole.high
            found[f"{self.name}.slope"] = self.calibration.slope(s.level).scale
            if self.name in step.calibrations:
                step.metrics.update(self._tell_calibration(self.calibration))
        scales = {name: a.scale(s.errors) for name, a in self.layers.items()}
        parts = {name: a.estimate for name, a in self.layers.items()}
        ends = {name: a.interval(s.level) for name, a in self.layers.items()}
        if not self.finite:
            found = dict.fromkeys(found, math.nan)
            scales, parts = dict.fromkeys(scales, math.nan), dict.fromkeys(parts, UNDETERMINED)
            ends = dict.fromkeys(ends, (math.nan, math.nan))
        step.signals.update(found)
        step.metrics.update(found)
        step.series[self.name] = scales
        step.series[f"{self.name}.signal"] = {name: part.signal for name, part in parts.items()}
        step.series[f"{self.name}.noise"] = {name: part.noise for name, part in parts.items()}
        step.series[f"{self.name}.low"] = {name: low for name, (low, _) in ends.items()}
        step.series[f"{self.name}.high"] = {name: high for name, (_, high) in ends.items()}

    def _tell_calibration(self, calibration: Calibration) -> dict[str, float]:
        """Return what one calibration adds: its point of the regression, and the slope's interval."""
        slope = calibration.slope(self.settings.level)
        return {
            f"{self.name}.point": calibration.norms.scale(),
            f"{self.name}.point_total": calibration.total.scale(),
            f"{self.name}.slope_low": slope.low,
            f"{self.name}.slope_high": slope.high,
        }

    def summary(self) -> str | None:
        reading, (signal, noise) = self.reading(), self.total.estimate
        said = f"{self.name}: undetermined, {reading.reason}"
        if not math.isnan(reading.scale):
            said = f"{self.name}: noise scale {reading.scale:.4g} {self.settings.counts}"
            if not math.isnan(reading.low):
                said += f" ({self.settings.level:.0%} {reading.low:.3g} to {reading.high:.3g})"
        if not math.isnan(signal):
            layers = len(self.layers)
            said += f", |G|^2 {signal:.3g}, tr(Sigma) {noise:.3g} over {layers} layer{'s' * (layers != 1)}"
            said += self._broken_summary()
        return said + self._calibration_summary()

    def _broken_summary(self) -> str:
        """Return how many steps told nothing because their gradients were not finite."""
        broken, steps = self.total.broken, self.total.steps
        if not broken:
            return ""
        last = "" if self.finite else ", the last one included: that is from before"
        return f"; gradients were not finite in {broken} of {steps} steps{last}"

    def _calibration_summary(self) -> str:
        if self.calibration is None:
            return ""
        slope, of = self.calibration.slope(self.settings.level), self.calibration
        if math.isnan(slope.scale):
            least = f", at least {slope.low:.3g} times that" if slope.low > 0 else ""
            return f"; whole model: undetermined, {slope.reason}{least}"
        return (
            f"; whole model: {slope.scale:.3g} times that ({slope.low:.3g} to {slope.high:.3g}),"
            f" correlation {of.correlation:.2f} over {of.points} calibrations"
        )

    # state

    def state_dict(self) -> State:
        import torch

        if not (self.position or self.total.steps):
            return {}
        state: State = {name: getattr(self, name) for name in ("position", "calibrated", "finite")}
        state |= {"unit": self.settings.unit, "what": self.settings.what}
        for name, sums in self._sums().items():
            state[name] = torch.tensor(sums.state(), dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known, odd = self._fitting(state)
        if state and odd:
            raise ValueError(f"{self.name}: the checkpoint measured something else: {odd}")
        self._load(state, known)

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        known, odd = self._fitting(state)
        self._load(state, known)
        return f"{self.name}: {odd}" if state and odd else None

    def _fitting(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        sizes = {name: one.SIZE for name, one in self._sums().items()}
        return fitting(state, sizes, self.settings.what)

    def _load(self, state: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        """Restore the sums that are known, and where on the clock they stand."""
        self.position, self.calibrated = (
            # Of another unit: before any position there is, so that only the step itself has passed.
            float(state.get(name, 0.0))
            if state.get("unit") in (None, self.settings.unit)
            else math.inf
            for name in ("position", "calibrated")
        )
        self.finite = bool(state.get("finite", True))
        for name, one in self._sums().items():
            one.load(known[name].tolist() if name in known else [0.0] * one.SIZE)

    def _sums(self) -> dict[str, Averages | Calibration]:
        sums: dict[str, Averages | Calibration] = {"total": self.total}
        sums |= {f"layer/{name}": a for name, a in self.layers.items()}
        return sums if self.calibration is None else sums | {"calibration": self.calibration}


def _one_each(parts: Sequence[Contribution]) -> list[Contribution]:
    """Return one contribution a replica: `whole` grows over its micro-batches, so the last one has it all."""
    import torch

    from trainc.runtime.step.record import Contribution

    by_replica: dict[int, list[Contribution]] = {}
    for part in parts:
        by_replica.setdefault(part.replica, []).append(part)
    return [
        Contribution(torch.cat([p.weights for p in own]), {}, whole=own[-1].whole)
        for own in by_replica.values()
    ]


def _calibrated(found: Calibrated, names: Iterable[str]) -> tuple[Estimate, Estimate]:
    """Return the estimates over `names` and over all parameters from examples measured one by one."""
    q = float(found.weights.double().square().sum())
    shares = {name: float(s.sum()) for name, s in found.squares.items() if name in found.whole}
    whole = {name: float(found.whole[name]) for name in shares}
    squares = Squares(shares, whole, q)
    if squares.alone:
        return UNDETERMINED, UNDETERMINED
    return squares.estimate(names), squares.estimate()
