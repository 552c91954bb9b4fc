"""TempBalance: layers whose spectra have the lightest tails, the least trained ones, learn fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.construct import Construct, Effect, Problem, Range
from trainc.runtime.action import Action, Phase, State

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bound import Targets
    from trainc.compiler.inventory import ParameterEntry
    from trainc.compiler.lowering import Lowering
    from trainc.kernels.spectrum import Hill
    from trainc.runtime.clock import Gate
    from trainc.runtime.optimizer import Scale
    from trainc.runtime.step import Step

DEFAULT_EVERY = 100
# A relative spread of the exponents below this is the arithmetic's, not the layers'.
SPREAD = 1e-5


@dataclass(frozen=True, slots=True)
class Unit:
    """What gets one factor: the parameter measured, and all parameters that share the factor."""

    name: str
    measured: str
    eigenvalues: int
    parameters: tuple[str, ...]


def balance(alphas: Mapping[str, float], low: float, high: float) -> dict[str, float]:
    """Map the smallest exponent to `low`, the largest to `high`, linearly between; without a spread all are 1."""
    smallest, largest = min(alphas.values(), default=0.0), max(alphas.values(), default=0.0)
    if largest - smallest <= SPREAD * abs(largest):
        return dict.fromkeys(alphas, 1.0)
    return {
        name: low + (alpha - smallest) / (largest - smallest) * (high - low) for name, alpha in alphas.items()
    }


class TempBalance(Construct):
    """Scales each module's rate by a linear map of its weight's Hill exponent alpha onto `range`.

    The eigenvalues are the squared singular values of the weight; a convolution pools those of its kh*kw matrices.
    alpha = 1 + k / sum(ln(lambda_j / xmin)) over the upper half. The smallest alpha among the measured modules gets
    the low end, the largest the high end. Selected vectors of a module, such as its bias, share its factor; in a
    module with several selected matrices each matrix has its own factor and vectors keep their rate.

    Measured at the first step that is due and then as often as `every` says, 100 steps without it; between
    measurements and after `until` the last factors hold. Factors are 1 where the published code has none: all
    exponents equal or a single module (there it gives the high end), and zero, non-finite or rank-deficient weights
    (a note says which). Modules with fewer eigenvalues than `min_eigenvalues` stay at 1. Embeddings and weights that
    are neither 2-D nor 4-D have no place in the selection.
    """

    cite: ClassVar = "Zhou et al., Temperature Balancing, NeurIPS 2023, arXiv:2312.00359"
    example: ClassVar = "lr temp_balance on ndim(2) - type(Embedding) every 200 steps { range = 0.5..1.5 }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"range": "1..1"}
    signals: ClassVar = {
        "spread": "standard deviation of alpha over the measured modules, no unit",
        "alpha": "mean alpha over the measured modules, no unit",
    }
    effects: ClassVar = (
        Effect("rates", "measure spectra", ("params", "clock"), ("rate", "metrics", "signal:spread", "signal:alpha")),
    )

    range: Range = Field(default=Range(0.5, 1.5), description="factors of the smallest and the largest alpha, no unit")
    xmin_pos: float = Field(
        default=2.0, gt=1, description="the tail begins at eigenvalue n / `xmin_pos` of n ascending ones: 2 is the median"
    )
    convention: Literal["code", "paper"] = Field(
        default="code",
        description="whether the threshold counts as one of the k terms (released code) or lies below them (paper)",
    )
    min_eigenvalues: int = Field(
        default=50, ge=2, description="modules with fewer eigenvalues keep their rate, a count"
    )
    smooth: float | None = Field(
        default=None, ge=0, lt=1, description="share of the previous alpha kept at each measurement, no unit"
    )
    skip_first: bool = Field(
        default=False, description="leave out the first selected module in registration order, as the paper does"
    )
    skip_last: bool = Field(default=False, description="leave out the last selected module, as the paper does")

    @field_validator("range", mode="after")
    @classmethod
    def _is_positive(cls, value: Range) -> Range:
        if value.low < 0:
            raise ValueError(f"a rate's factor is not negative, but the range begins at {value.low:g}")
        return value

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each weight's factor by definition: singular values in float64, one weight at a time."""
        import torch

        found = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            stack = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
            ascending = torch.linalg.svdvals(stack).flatten().square().sort().values
            n = len(ascending)
            if self.convention == "code":
                k = n - int(n / self.xmin_pos)
                xmin = ascending[n - k]
            else:
                k = int(n - n / self.xmin_pos)
                xmin = ascending[n - k - 1]
            found[name] = float(1 + k / (ascending[n - k :].log().sum() - k * xmin.log()))
        return balance(found, self.range.low, self.range.high)

    def tuned(self, parameters: Iterable[ParameterEntry]) -> tuple[list[Unit], list[Unit]]:
        """Return the units to balance, and those left at their rate for want of eigenvalues."""
        units = _units(parameters)[0]
        units = units[1 if self.skip_first else 0 : len(units) - 1 if self.skip_last else len(units)]
        enough = [unit for unit in units if unit.eigenvalues >= self.min_eigenvalues]
        return enough, [unit for unit in units if unit.eigenvalues < self.min_eigenvalues]

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Object to what has no spectrum; warn where too little is left to balance."""
        _, unfit = _units(bound.parameters)
        if unfit:
            shown = ", ".join(f"`{p.name}` {list(p.shape)}" for p in unfit[:5])
            more = f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""
            yield Problem(
                "unfit-target",
                f"no spectrum to balance by: {shown}{more}",
                notes=("measured are 2-D and 4-D weights that are no embeddings; vectors beside one share its factor",),
                help="narrow the selection, for instance `- type(Embedding) - role(norm)`",
            )
        enough, few = self.tuned(bound.parameters)
        if len(enough) < 2:
            small = tuple(f"`{unit.name}` has {unit.eigenvalues} eigenvalues" for unit in few[:5])
            yield Problem(
                "no-effect",
                f"{len(enough)} of the selected modules can be measured, balancing takes two",
                field="min_eigenvalues" if few else None,
                notes=small,
                help="select more modules" + (" or lower `min_eigenvalues`" if few else ""),
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every measured module a factor and refresh them before the rates are set."""
        from trainc.kernels.spectrum import Hill

        enough, few = self.tuned(to.parameters())
        scales = {unit.name: to.scale(unit.name, unit.parameters) for unit in enough}
        hill = Hill(self.xmin_pos, self.convention)
        left = {unit.name: unit.eigenvalues for unit in few}
        to.action(Balance(to.label, self, hill, enough, scales, left, None if to.clause.every else _default_gate()))


def _units(parameters: Iterable[ParameterEntry]) -> tuple[list[Unit], list[ParameterEntry]]:
    """Return the units of a selection in registration order, and the parameters that can be in none."""
    from trainc.kernels.spectrum import count

    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    units, unfit = [], []
    for name, members in modules.items():
        weights = [p for p in members if p.ndim in (2, 4) and "Embedding" not in p.types]
        vectors = [p for p in members if p.ndim == 1]
        unfit += [p for p in members if p not in weights and (p not in vectors or not weights)]
        shared = tuple(p.name for p in members if p in weights or p in vectors)
        for p in weights:
            alone = len(weights) > 1 or not name
            names = (p.name,) if len(weights) > 1 else shared
            units.append(Unit(p.name if alone else name, p.name, count(p.shape), names))
    return units, unfit


def _default_gate() -> Gate:
    from trainc.runtime.clock import Duration, Gate

    return Gate(every=Duration(DEFAULT_EVERY, "steps"))


class Balance(Action):
    """Phase 2: measure the exponents anew and set the factors.

    `pace`, where the clause says nothing, is when to measure again after the first time.
    """

    phase = Phase.RATES
    reads = ("params", "clock")
    writes = ("rate", "metrics")

    def __init__(
        self,
        label: str,
        construct: TempBalance,
        hill: Hill,
        units: Iterable[Unit],
        scales: Mapping[str, Scale],
        left: Mapping[str, int],
        pace: Gate | None,
    ) -> None:
        self.name = label
        self.construct = construct
        self.hill = hill
        self.units = tuple(units)
        self.scales = dict(scales)
        self.left = dict(left)
        self.pace = pace
        self._reset()

    def _reset(self) -> None:
        self.alphas: dict[str, float] = {}
        self.refreshes = 0
        self.first_spread = 0.0
        for scale in self.scales.values():
            scale.factor = 1.0

    def run(self, step: Step) -> None:
        from trainc.kernels.spectrum import alphas

        if self.refreshes and self.pace is not None and not self.pace.fires(step.clock):
            return
        measured = alphas([step.parameters[unit.measured] for unit in self.units], self.hill)
        found = {u.name: a for u, a in zip(self.units, measured, strict=True) if math.isfinite(a)}
        for unit in self.units:
            if unit.name not in found and (not self.refreshes or unit.name in self.alphas):
                step.notes.append(
                    f"{self.name}: `{unit.measured}` is zero, not finite or of low rank: its rate keeps the factor 1"
                )
        keep = self.construct.smooth or 0.0
        self.alphas = {name: keep * self.alphas.get(name, a) + (1 - keep) * a for name, a in found.items()}
        factors = balance(self.alphas, self.construct.range.low, self.construct.range.high)
        for name, scale in self.scales.items():
            scale.factor = factors.get(name, 1.0)
        if not self.refreshes:
            self.first_spread = self.spread
        self.refreshes += 1
        self._report(step)

    @property
    def spread(self) -> float:
        """Return the standard deviation of the exponents, over the measured modules as a population."""
        return pstdev(self.alphas.values()) if self.alphas else 0.0

    def _report(self, step: Step) -> None:
        step.series[f"{self.name}.alpha"] = dict(self.alphas)
        step.series[f"{self.name}.scale"] = {name: scale.factor for name, scale in self.scales.items()}
        if self.alphas:
            found = {f"{self.name}.spread": self.spread, f"{self.name}.alpha": fmean(self.alphas.values())}
            step.signals.update(found)
            step.metrics.update(found)

    def state_dict(self) -> State:
        if not self.refreshes:
            return {}
        out: State = {"refreshes": self.refreshes, "first_spread": self.first_spread}
        for name, scale in self.scales.items():
            out[f"factor/{name}"] = scale.factor
        return out | {f"alpha/{name}": alpha for name, alpha in self.alphas.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reset()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if name and name not in self.scales:
                raise ValueError(f"{self.name}: the checkpoint balances `{name}`, which is not balanced here")
            if kind == "factor":
                self.scales[name].factor = float(value)
            elif kind == "alpha":
                self.alphas[name] = float(value)
        self.refreshes = int(state.get("refreshes", 0))
        self.first_spread = float(state.get("first_spread", 0.0))

    def summary(self) -> str | None:
        kept = ", ".join(f"{name} ({n} eigenvalues)" for name, n in self.left.items())
        tail = f"; left at 1: {kept}" if kept else ""
        if not self.refreshes or not self.scales:
            return f"{self.name}: nothing measured{tail}"
        slow = min(self.scales, key=lambda name: self.scales[name].factor)
        fast = max(self.scales, key=lambda name: self.scales[name].factor)
        return (
            f"{self.name}: alpha spread {self.first_spread:.3g} -> {self.spread:.3g} in {self.refreshes} measurements; "
            f"factors {self.scales[slow].factor:.3g} ({slow}) to {self.scales[fast].factor:.3g} ({fast}){tail}"
        )
