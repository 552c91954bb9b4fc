"""Phase 7 of a step: its noise scale, by layer and in total, averaged over steps and told with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainc.runtime.action import Action, Phase, State
from trainc.runtime.averages import Averages
from trainc.runtime.calibration import Calibration
from trainc.runtime.estimates import UNDETERMINED, Estimate, Reading, Spread
from trainc.runtime.noise_scale import Squares

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step import Calibrated, Contribution, Step

Unit = Literal["steps", "samples", "tokens"]
Method = Literal["per_example", "micro_batch", "replica", "ghost"]
Geometry = Literal["euclidean", "adam", "sign"]
Found = tuple[Estimate, Spread | None]

TOTAL = ""
"""The key of all measured layers together beside those of single ones."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a noise scale is taken.

    `half_life` of the averages is in `unit`, `calibrations` that of the calibration's in calibrations (None: there is
    none). `errors` is how many standard errors the signal must be above zero, `level` the probability of intervals,
    `counts` the word for what an example is.
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


class Measure(Action):
    """Estimates from `measured`, the parameters by module."""

    phase = Phase.REDUCE
    reads = ("probe", "gradient", "clock")
    writes = ("metrics",)

    def __init__(
        self, name: str, measured: Mapping[str, tuple[str, ...]], settings: Settings
    ) -> None:
        self.name = name
        self.measured = dict(measured)
        self.settings = settings
        self.total = Averages()
        self.layers = {module: Averages() for module in measured}
        self.calibration = None if settings.calibrations is None else Calibration()
        self.position = 0.0

    def run(self, step: Step) -> None:
        names = list(dict.fromkeys(name for owned in self.measured.values() for name in owned))
        gradients = {n: g for n in names if (g := step.parameters[n].grad) is not None}
        groups = {module: [n for n in o if n in gradients] for module, o in self.measured.items()}
        groups = {TOTAL: list(gradients), **{m: owned for m, owned in groups.items() if owned}}
        if step.contributions and gradients:
            self._fold(self._estimates(step, gradients, groups), step)
        if (found := step.calibrations.get(self.name)) is not None and self.calibration is not None:
            assert self.settings.calibrations is not None
            decay = 0.5 ** (1 / self.settings.calibrations)
            self.calibration.add(*_calibrated(found, names), decay)
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
            from trainc.runtime.noise_rows import Rows

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
            return
        decay = 0.5 ** (self._elapsed(step) / self.settings.half_life)
        self.total.add(estimate, decay, spread)
        for module, averages in self.layers.items():
            if module in found:
                averages.add(found[module][0], decay, found[module][1])

    def _elapsed(self, step: Step) -> float:
        """Return what passed since the last estimate, this step included."""
        now = {"steps": 1, "samples": step.samples, "tokens": step.tokens}[self.settings.unit]
        before, self.position = self.position, getattr(step.clock, self.settings.unit) + now
        return max(self.position - before, float(now))

    # what is told

    def reading(self) -> Reading:
        """Return the noise scale of all measured layers, or why there is none."""
        s = self.settings
        return self.total.reading(s.level, s.errors, s.counts)

    def whole(self) -> Reading:
        """Return the noise scale of the whole model as the calibration predicts it."""
        if self.calibration is None:
            return Reading(math.nan, reason="no calibration")
        error = self.total.error()
        return self.calibration.predict(
            self.reading().scale, self.settings.level, 0.0 if math.isnan(error) else error
        )

    def _tell(self, step: Step) -> None:
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
            line = self.calibration.through_origin(s.level)
            found[f"{self.name}.total"] = whole.scale
            found[f"{self.name}.total_low"], found[f"{self.name}.total_high"] = (
                whole.low,
                whole.high,
            )
            found[f"{self.name}.slope"] = line.slope
        step.signals.update(found)
        step.metrics.update(found)
        if self.calibration is not None and self.name in step.calibrations:
            step.metrics.update(self._tell_calibration(self.calibration))
        step.series[self.name] = {name: a.scale(s.errors) for name, a in self.layers.items()}
        parts = {name: a.estimate for name, a in self.layers.items()}
        step.series[f"{self.name}.signal"] = {name: part.signal for name, part in parts.items()}
        step.series[f"{self.name}.noise"] = {name: part.noise for name, part in parts.items()}
        ends = {name: a.interval(s.level) for name, a in self.layers.items()}
        step.series[f"{self.name}.low"] = {name: low for name, (low, _) in ends.items()}
        step.series[f"{self.name}.high"] = {name: high for name, (_, high) in ends.items()}

    def _tell_calibration(self, calibration: Calibration) -> dict[str, float]:
        """Return what one calibration adds: its point of the regression, and the slope's interval."""
        line = calibration.through_origin(self.settings.level)
        return {
            f"{self.name}.point": calibration.norms.scale(),
            f"{self.name}.point_total": calibration.total.scale(),
            f"{self.name}.slope_low": line.low,
            f"{self.name}.slope_high": line.high,
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
        return said + self._calibration_summary()

    def _calibration_summary(self) -> str:
        if self.calibration is None:
            return ""
        line = self.calibration.through_origin(self.settings.level)
        if math.isnan(line.slope):
            return f"; whole model: {self.whole().reason}"
        bounds = f"{line.low:.3g} to {line.high:.3g}"
        if not math.isfinite(line.high):
            bounds = "no interval: too few independent calibrations"
        return (
            f"; whole model: {line.slope:.3g} times that ({bounds}), correlation"
            f" {self.calibration.correlation:.2f} over {self.calibration.points} calibrations"
        )

    # state

    def state_dict(self) -> State:
        import torch

        if not (self.position or self.total.steps):
            return {}
        state: State = {"position": self.position}
        for name, sums in self._sums().items():
            state[name] = torch.tensor(sums.state(), dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sums = self._sums()
        odd = sorted(set(state) ^ {"position", *sums})
        if state and odd:
            raise ValueError(f"{self.name}: the checkpoint measured other layers: {', '.join(odd)}")
        self.position = float(state.get("position", 0.0))
        for name, one in sums.items():
            one.load(state[name].tolist() if state else [0.0] * one.SIZE)

    def _sums(self) -> dict[str, Averages | Calibration]:
        sums: dict[str, Averages | Calibration] = {"total": self.total}
        sums |= {f"layer/{name}": a for name, a in self.layers.items()}
        return sums if self.calibration is None else sums | {"calibration": self.calibration}


def _one_each(parts: Sequence[Contribution]) -> list[Contribution]:
    """Return one contribution a replica: `whole` grows over its micro-batches, so the last one has it all."""
    import torch

    from trainc.runtime.step import Contribution

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
