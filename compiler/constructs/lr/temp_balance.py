"""TempBalance: the lighter the tail of a layer's spectrum, the faster it learns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem, Range
from trainc.runtime.step.action import Action, Phase, State

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.schedule.clock import Gate
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step

# How often to measure where the clause does not say.
EVERY_STEPS = 100
# A relative spread of the exponents below this is the arithmetic's, not the layers'.
NO_SPREAD = 1e-5


@dataclass(frozen=True, slots=True)
class Unit:
    """What gets one factor: the weight measured, and all parameters that share the factor."""

    name: str
    weight: str
    eigenvalues: int
    parameters: tuple[str, ...]


class TempBalance(Construct):
    """Scales each module's rate by a linear map of its weight's Hill exponent alpha onto `range`.

    The eigenvalues are the squared singular values of the weight; a convolution pools those of its
    kh*kw matrices. alpha = 1 + k / sum(ln(lambda / xmin)) over the k largest of them. The smallest
    alpha among the modules gets the low end, the largest the high end. Selected vectors of a
    module, such as its bias, share its factor; where a module has several selected matrices, each
    has a factor of its own and the vectors keep their rate.

    Measured at the first step that is due, then as often as `every` says, 100 steps without it;
    between measurements and after `until` the last factors hold. All exponents equal, or only one,
    give the factor 1 (the published code gives the high end), and so does a weight that is zero,
    not finite or of low rank, with a note. Modules with fewer eigenvalues than `min_eigenvalues`
    keep their rate. Embeddings, and modules without a 2-D or 4-D weight, may not be selected.
    """

    cite: ClassVar = "Zhou et al., Temperature Balancing, NeurIPS 2023, arXiv:2312.00359"
    usage: ClassVar = (
        "lr temp_balance on ndim(2) - type(Embedding) every 200 steps { range = 0.5..1.5 }"
    )
    targets: ClassVar = "parameters"
    identity: ClassVar = {"range": "1..1"}
    signals: ClassVar = {
        "spread": "standard deviation of alpha over the measured modules, no unit",
        "alpha": "mean alpha over the measured modules, no unit",
    }
    effects: ClassVar = (
        Effect(
            "rates",
            "measure spectra and set factors",
            ("params", "clock"),
            ("rate", "metrics", "signal:spread", "signal:alpha"),
        ),
    )

    range: Range = Field(
        default=Range(0.5, 1.5), description="factors of the smallest and largest alpha, no unit"
    )
    xmin_pos: float = Field(
        default=2.0,
        gt=1,
        description="the tail begins at the n / `xmin_pos`-th of n ascending eigenvalues, no unit",
    )
    convention: Literal["code", "paper"] = Field(
        default="code",
        description="whether xmin is one of the k terms (`code`, as released) or lies below them",
    )
    min_eigenvalues: int = Field(
        default=50, ge=2, description="modules with fewer eigenvalues keep their rate, a count"
    )
    smooth: float | None = Field(
        default=None, ge=0, lt=1, description="share of the alpha before in the next one, no unit"
    )
    skip_first: bool = Field(
        default=False, description="leave out the first selected module, in registration order"
    )
    skip_last: bool = Field(default=False, description="leave out the last selected module")

    @field_validator("range", mode="after")
    @classmethod
    def _is_no_reversal(cls, value: Range) -> Range:
        if value.low < 0:
            raise ValueError(f"a rate's factor is not negative, as {value.low:g} is")
        return value

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each weight's factor by definition, from singular values in float64."""
        import torch

        found = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            w = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
            ascending = torch.linalg.svdvals(w).square().flatten().sort().values
            n = len(ascending)
            if self.convention == "code":
                k = n - int(n / self.xmin_pos)
                xmin = ascending[n - k]
            else:
                k = int(n - n / self.xmin_pos)
                xmin = ascending[n - k - 1]
            found[name] = float(1 + k / (ascending[n - k :].log().sum() - k * xmin.log()))
        return self.balance(found)

    def balance(self, alphas: Mapping[str, float]) -> dict[str, float]:
        """Map the exponents linearly onto `range`; without a spread all factors are 1."""
        least, most = min(alphas.values(), default=0.0), max(alphas.values(), default=0.0)
        if most - least <= NO_SPREAD * abs(most):
            return dict.fromkeys(alphas, 1.0)
        slope = (self.range.high - self.range.low) / (most - least)
        return {name: self.range.low + slope * (alpha - least) for name, alpha in alphas.items()}

    def units(self, parameters: Iterable[ParameterEntry]) -> tuple[list[Unit], list[Unit]]:
        """Return the units to balance, and those that have too few eigenvalues for it."""
        units, _ = _units(parameters)
        kept = units[int(self.skip_first) : len(units) - int(self.skip_last)]
        few = [unit for unit in kept if unit.eigenvalues < self.min_eigenvalues]
        return [unit for unit in kept if unit not in few], few

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Object to what has no spectrum; warn where fewer than two modules are left to balance."""
        _, unfit = _units(bound.parameters)
        if unfit:
            shown = ", ".join(f"`{p.name}` {list(p.shape)}" for p in unfit[:5])
            yield Problem(
                "wrong-target-kind",
                f"no spectrum to balance by: {shown}{', ...' if len(unfit) > 5 else ''}",
                notes=("a spectrum is that of a 2-D or 4-D weight which is no embedding",),
                help="narrow the selection, for instance with `- type(Embedding) - role(norm)`",
            )
        units, few = self.units(bound.parameters)
        if len(units) < 2:
            yield Problem(
                "no-effect",
                f"balancing takes two modules, and {len(units)} of those selected can be measured",
                field="min_eigenvalues" if few else None,
                notes=tuple(f"`{u.name}` has {u.eigenvalues} eigenvalues" for u in few[:5]),
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every unit a factor, and measure before the optimizer's rates are set."""
        from trainc.runtime.schedule.clock import Duration, Gate

        units, few = self.units(to.parameters())
        lr_factors = [to.lr_factor(unit.name, unit.parameters) for unit in units]
        pace = None if to.clause.every else Gate(every=Duration(EVERY_STEPS, "steps"))
        to.action(Balance(to.label, self, units, lr_factors, few, pace))


def _units(parameters: Iterable[ParameterEntry]) -> tuple[list[Unit], list[ParameterEntry]]:
    """Return a selection's units in registration order, and the parameters that are in none."""
    from trainc.kernels.parameter.spectrum import count

    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    units: list[Unit] = []
    unfit: list[ParameterEntry] = []
    for name, members in modules.items():
        weights = [p for p in members if p.ndim in (2, 4) and "Embedding" not in p.types]
        vectors = [p for p in members if p.ndim == 1 and weights]
        unfit += [p for p in members if p not in weights and p not in vectors]
        if len(weights) == 1 and name:
            names = tuple(p.name for p in members if p in weights or p in vectors)
            units.append(Unit(name, weights[0].name, count(weights[0].shape), names))
        else:
            units += [Unit(p.name, p.name, count(p.shape), (p.name,)) for p in weights]
    return units, unfit


class Balance(Action):
    """Phase 2: measure the exponents and set the factors; `pace` is a gate beside the clause's."""

    phase = Phase.RATES
    reads = ("params", "clock")
    writes = ("rate", "metrics")

    def __init__(
        self,
        name: str,
        construct: TempBalance,
        units: Sequence[Unit],
        lr_factors: Sequence[LrFactor],
        few: Sequence[Unit],
        pace: Gate | None,
    ) -> None:
        self.name = name
        self.construct = construct
        self.units = tuple(units)
        self.lr_factors = {
            unit.name: factor for unit, factor in zip(units, lr_factors, strict=True)
        }
        self.few = tuple(few)
        self.pace = pace
        self.alphas: dict[str, float] = {}
        self.measurements = 0
        self.first_spread = 0.0

    def run(self, step: Step) -> None:
        from trainc.kernels.parameter.spectrum import Hill, alphas

        if self.measurements and self.pace is not None and not self.pace.fires(step.clock):
            return
        hill = Hill(self.construct.xmin_pos, self.construct.convention)
        measured = alphas([step.parameters[unit.weight] for unit in self.units], hill)
        keep, before = self.construct.smooth or 0.0, self.alphas
        self.alphas = {}
        for unit, alpha in zip(self.units, measured, strict=True):
            if math.isfinite(alpha):
                self.alphas[unit.name] = keep * before.get(unit.name, alpha) + (1 - keep) * alpha
            elif unit.name in before or not self.measurements:
                reason = "is zero, not finite or of low rank, its factor is 1"
                step.notes.append(f"{self.name}: `{unit.weight}` {reason}")
        factors = self.construct.balance(self.alphas)
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = factors.get(name, 1.0)
        self.first_spread = self.first_spread if self.measurements else self.spread
        self.measurements += 1
        self._tell(step)

    @property
    def spread(self) -> float:
        """Return the standard deviation of the exponents over all measured units."""
        return pstdev(self.alphas.values()) if self.alphas else 0.0

    def _tell(self, step: Step) -> None:
        factors = {name: lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        step.series[f"{self.name}.alpha"] = dict(self.alphas)
        step.series[f"{self.name}.scale"] = factors
        if self.alphas:
            mean = fmean(self.alphas.values())
            found = {f"{self.name}.spread": self.spread, f"{self.name}.alpha": mean}
            step.signals.update(found)
            step.metrics.update(found)

    def state_dict(self) -> State:
        if not self.measurements:
            return {}
        out: State = {"measurements": self.measurements, "first_spread": self.first_spread}
        out |= {f"factor/{name}": lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        return out | {f"alpha/{name}": alpha for name, alpha in self.alphas.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        named = {key: key.partition("/")[2] for key in state if "/" in key}
        for name in named.values():
            if name not in self.lr_factors:
                raise ValueError(f"{self.name}: the checkpoint also balances `{name}`")
        self.alphas = {n: float(state[k]) for k, n in named.items() if k.startswith("alpha/")}
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = float(state.get(f"factor/{name}", 1.0))
        self.measurements = int(state.get("measurements", 0))
        self.first_spread = float(state.get("first_spread", 0.0))

    def summary(self) -> str | None:
        left = ", ".join(f"{unit.name} ({unit.eigenvalues} eigenvalues)" for unit in self.few)
        tail = f"; left at 1: {left}" if left else ""
        if not (self.measurements and self.lr_factors):
            return f"{self.name}: nothing measured{tail}"
        ranked = sorted(self.lr_factors, key=lambda name: self.lr_factors[name].factor)
        low, high = (f"{self.lr_factors[n].factor:.3g} ({n})" for n in (ranked[0], ranked[-1]))
        return (
            f"{self.name}: alpha spread {self.first_spread:.3g} -> {self.spread:.3g}, "
            f"measured {self.measurements}x, factors {low} to {high}{tail}"
        )
