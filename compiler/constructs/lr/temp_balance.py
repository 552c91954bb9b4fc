"""TempBalance: learning rates by the tail of each weight's spectrum, higher for lighter tails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem, Range
from trainc.dsl.values import value_json as v
from trainc.runtime.step.action import Action, ActionState, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step

# How often to measure where the clause does not say.
EVERY_STEPS = 100
# A relative spread of the exponents below this is the arithmetic's, not the layers'.
NO_SPREAD = 1e-5


class TempBalance(Construct):
    """Scales the learning rate of each module by its weight's Hill exponent alpha, mapped linearly onto `range`.

    The eigenvalues are the squared singular values of the weight; a convolution uses those of all
    its kh*kw matrices together. alpha = 1 + k / sum(ln(lambda / xmin)) over the k largest of them.
    The smallest alpha gets the low end of `range`, the largest the high end. Selected vectors of a
    module, such as its bias, share its factor; where a module has several selected matrices, each
    has its own factor and the vectors keep their rate.

    Factors are measured at the first step that is due, then `every` so often, by default every 100
    steps; between measurements and after `until` the last factors hold. The factor is 1 if all
    exponents are equal or there is only one (the published code gives the high end), and, with a
    note, for a weight that is zero, not finite or of low rank. Modules with fewer eigenvalues than
    `min_eigenvalues` keep their rate. Embeddings, and modules without a 2-D or 4-D weight, may not
    be selected.
    """

    cite: ClassVar = "Zhou et al., Temperature Balancing, NeurIPS 2023, arXiv:2312.00359"
    usage: ClassVar = (
        "lr temp_balance on ndim(2) - type(Embedding) every 200 steps { range = 0.5..1.5 }"
    )
    targets: ClassVar = "parameters"
    identity: ClassVar = {"range": "1..1"}
    signals: ClassVar = {
        "spread": "standard deviation of alpha over the measured modules",
        "alpha": "mean alpha over the measured modules",
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
        default=v.Range(0.5, 1.5), description="factors of the smallest and the largest alpha"
    )
    xmin_pos: float = Field(
        default=2.0,
        gt=1,
        description="the tail begins at eigenvalue number n / `xmin_pos` of n in ascending order",
    )
    convention: Literal["code", "paper"] = Field(
        default="code",
        description="whether xmin is one of the k eigenvalues (`code`, as published) or the one below them"
        " (`paper`)",
    )
    min_eigenvalues: int = Field(
        default=50, ge=2, description="modules with fewer eigenvalues than this keep their rate"
    )
    smooth: float | None = Field(
        default=None, ge=0, lt=1, description="weight of the previous alpha in the new one"
    )
    skip_first: bool = Field(
        default=False, description="leave out the first selected module, in registration order"
    )
    skip_last: bool = Field(
        default=False, description="leave out the last selected module, in registration order"
    )

    @field_validator("range", mode="after")
    @classmethod
    def _is_no_reversal(cls, value: Range) -> Range:
        if value.low < 0:
            raise ValueError(f"a factor of a learning rate cannot be negative: {value.low:g}")
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

    def groups(
        self, parameters: Iterable[ParameterEntry]
    ) -> tuple[list[BalancedGroup], list[BalancedGroup]]:
        """Return the groups to balance, and those that have too few eigenvalues for it."""
        groups, _ = find_groups(parameters)
        kept = groups[int(self.skip_first) : len(groups) - int(self.skip_last)]
        few = [group for group in kept if group.eigenvalues < self.min_eigenvalues]
        return [group for group in kept if group not in few], few

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Object to parameters without a spectrum; warn where fewer than two modules are left to balance."""
        _, unfit = find_groups(bound.parameters)
        if unfit:
            shown = ", ".join(f"`{p.name}` {list(p.shape)}" for p in unfit[:5])
            yield Problem(
                "wrong-target-kind",
                f"these parameters have no spectrum: {shown}{', ...' if len(unfit) > 5 else ''}",
                notes=("a spectrum needs a 2-D or 4-D weight that is not an embedding",),
                help="exclude them from `on`, for instance with `- type(Embedding) - role(norm)`",
            )
        groups, few = self.groups(bound.parameters)
        if len(groups) < 2:
            yield Problem(
                "no-effect",
                f"`lr temp_balance` needs two modules that can be measured, but the selection has {len(groups)}",
                field="min_eigenvalues" if few else None,
                notes=tuple(f"`{u.name}` has {u.eigenvalues} eigenvalues" for u in few[:5]),
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every group a factor, and measure before the optimizer's rates are set."""
        from trainc.runtime.schedule.gate import Gate
        from trainc.runtime.schedule.time_span import TimeSpan

        groups, few = self.groups(to.parameters())
        lr_factors = {
            group.name: to.lr_factor(group.name, group.parameters, holds=True) for group in groups
        }
        pace = None if to.clause.every else Gate(every=TimeSpan(EVERY_STEPS, "steps"))
        to.action(Balance(to.label, self, groups, lr_factors, few, pace))


@dataclass(frozen=True, slots=True)
class BalancedGroup:
    """The parameters that share one factor, and the one of them whose spectrum is measured."""

    name: str
    weight: str
    eigenvalues: int
    parameters: tuple[str, ...]


def find_groups(
    parameters: Iterable[ParameterEntry],
) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
    """Return the groups of a selection in registration order, and the parameters without a spectrum."""
    from trainc.kernels.parameter.spectrum import count

    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    groups: list[BalancedGroup] = []
    unfit: list[ParameterEntry] = []
    for name, members in modules.items():
        weights = [p for p in members if p.ndim in (2, 4) and "Embedding" not in p.types]
        vectors = [p for p in members if p.ndim == 1 and weights]
        unfit += [p for p in members if p not in weights and p not in vectors]
        if len(weights) == 1 and name:
            names = tuple(p.name for p in members if p in weights or p in vectors)
            groups.append(BalancedGroup(name, weights[0].name, count(weights[0].shape), names))
        else:
            groups += [BalancedGroup(p.name, p.name, count(p.shape), (p.name,)) for p in weights]
    return groups, unfit


@dataclass(eq=False)
class Balance(Action):
    """Phase 2: measure the exponents and set the factors; `pace` is a second gate besides the clause's."""

    phase = Phase.RATES
    name: str
    construct: TempBalance
    groups: Sequence[BalancedGroup]
    lr_factors: Mapping[str, LrFactor]
    few: Sequence[BalancedGroup]
    pace: Gate | None
    alphas: dict[str, float] = field(default_factory=dict)
    measurements: int = 0
    first_spread: float = 0.0

    def run(self, step: Step) -> None:
        from trainc.kernels.parameter.spectrum import Hill, alphas

        if self.measurements and self.pace is not None and not self.pace.fires(step.clock):
            return
        hill = Hill(self.construct.xmin_pos, self.construct.convention)
        measured = alphas([step.parameters[group.weight] for group in self.groups], hill)
        keep, before = self.construct.smooth or 0.0, self.alphas
        self.alphas = {}
        for group, alpha in zip(self.groups, measured, strict=True):
            if math.isfinite(alpha):
                self.alphas[group.name] = keep * before.get(group.name, alpha) + (1 - keep) * alpha
            elif group.name in before or not self.measurements:
                reason = "is zero, not finite or of low rank, so its factor is 1"
                step.notes.append(f"{self.name}: `{group.weight}` {reason}")
        factors = self.construct.balance(self.alphas)
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = factors.get(name, 1.0)
        self.first_spread = self.first_spread if self.measurements else self.spread
        self.measurements += 1
        self._record(step)

    @property
    def spread(self) -> float:
        """Return the standard deviation of the exponents over the measured groups."""
        return pstdev(self.alphas.values()) if self.alphas else 0.0

    def _record(self, step: Step) -> None:
        factors = {name: lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        step.series[f"{self.name}.alpha"] = dict(self.alphas)
        step.series[f"{self.name}.lr_factor"] = factors
        if self.alphas:
            mean = fmean(self.alphas.values())
            found = {f"{self.name}.spread": self.spread, f"{self.name}.alpha": mean}
            step.signals.update(found)
            step.metrics.update(found)

    def state_dict(self) -> ActionState:
        if not self.measurements:
            return {}
        out: ActionState = {"measurements": self.measurements, "first_spread": self.first_spread}
        out |= {f"factor/{name}": lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        return out | {f"alpha/{name}": alpha for name, alpha in self.alphas.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        named = {key: key.partition("/")[2] for key in state if "/" in key}
        for name in named.values():
            if name not in self.lr_factors:
                raise ValueError(
                    f"{self.name}: the checkpoint has a factor for `{name}`, which this clause does not select"
                )
        self.alphas = {n: float(state[k]) for k, n in named.items() if k.startswith("alpha/")}
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = float(state.get(f"factor/{name}", 1.0))
        self.measurements = int(state.get("measurements", 0))
        self.first_spread = float(state.get("first_spread", 0.0))

    def summary(self) -> str | None:
        left = ", ".join(f"{group.name} ({group.eigenvalues} eigenvalues)" for group in self.few)
        tail = f"; too few eigenvalues, factor 1: {left}" if left else ""
        if not (self.measurements and self.lr_factors):
            return f"{self.name}: nothing measured{tail}"
        ranked = sorted(self.lr_factors, key=lambda name: self.lr_factors[name].factor)
        low, high = (f"{self.lr_factors[n].factor:.3g} ({n})" for n in (ranked[0], ranked[-1]))
        return (
            f"{self.name}: alpha spread {self.first_spread:.3g} -> {self.spread:.3g}, "
            f"measured {self.measurements}x, factors {low} to {high}{tail}"
        )
