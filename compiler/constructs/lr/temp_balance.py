"""TempBalance: learning rates by the tail of each weight's spectrum, higher for lighter tails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.lr._balance import Control, Map, Unit, balance, by_unit, controlled
from trainc.compiler.constructs.lr._groups import BalancedGroup, find_groups
from trainc.dsl.reading.construct import Construct, Effect, Problem, Range
from trainc.dsl.values import value_json as v
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import AnyNumber, Count, Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step

Fit = Literal["median", "dks", "peak"]

# How often to measure where the clause does not say.
EVERY_STEPS = 100


class TempBalance(Construct):
    """Scales the learning rate of each module by its weight's Hill exponent alpha, mapped onto `range`.

    The eigenvalues are the squared singular values of the weight; a convolution uses those of all
    its kh*kw matrices together. alpha = 1 + k / sum(ln(lambda / xmin)) over the k largest of them.
    With `map = linear` the smallest alpha gets the low end of `range`, the largest the high end.
    Selected vectors of a module, such as its bias, share its factor; where a module has several
    selected matrices, each has its own factor and the vectors keep their rate.

    `fit` says where the tail begins: `median` at a fixed place, `dks` where the power law fits best,
    `peak` the same near the mode of the spectrum over log10(lambda), with the lower bound that the
    released code means (it compares the bound's logarithm with eigenvalues). `dks` and `peak` differ
    a lot between equal layers; `median` does not.

    `map = sqrt` and `log2` give factors in proportion to sqrt(alpha) and log2(alpha), with a mean of
    1. `step` goes by rank r of n, from 0: low + (high - low) r / n. `sigmoid` is that of model
    balancing (Liu et al., EMNLP 2024, arXiv:2410.12178): 10^(s (1 / (1 + exp(-10 (alpha - mean))) -
    1/2)), with `range` its limits below and above the mean.

    With `unit = block`, as model balancing has it, all modules of a block share the factor of their
    mean alpha, and what stands before the first block or after the last keeps its rate. `control`
    changes what the factors follow and nothing else: `permuted` gives each unit the alpha of another,
    drawn anew at every measurement, `reversed` mirrors alpha between the smallest and the largest,
    and `static` keeps the factors of the first measurement. If a control does as well, the gain is
    not by the measurement.

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
    functions: ClassVar = (
        "trainc.compiler.constructs.lr._balance:balance",
        "trainc.kernels.parameter.spectral_null:null_alpha",
        "trainc.kernels.parameter.spectral_null:null_distance",
        "trainc.kernels.parameter.spectral_windows:farms_alpha",
        "trainc.kernels.parameter.spectrum:spectrum",
        "trainc.kernels.parameter.tail_fit:hill_alpha",
    )
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

    map: Map = Field(
        default="linear",
        description="how factors follow from alpha: `linear`, `sqrt`, `log2`, `step` or `sigmoid`",
    )
    range: Range = Field(
        default=v.Range(0.5, 1.5),
        description="factors of the smallest and the largest alpha; `sqrt` and `log2` do not use it",
    )
    fit: Fit = Field(
        default="median", description="where the tail begins: `median`, `dks` or `peak`"
    )
    xmin_pos: float = Field(
        default=2.0,
        gt=1,
        description="with `median` the tail begins at eigenvalue number n / `xmin_pos` of n in ascending order",
    )
    convention: Literal["code", "paper"] = Field(
        default="code",
        description="whether xmin is one of the k eigenvalues (`code`, as published) or the one below them"
        " (`paper`)",
    )
    unit: Unit = Field(
        default="module",
        description="what has an alpha of its own: a `module`, or a `block`, with the mean over its modules",
    )
    control: Control = Field(
        default="none",
        description="what tells whether the measurement matters: `permuted`, `reversed` or `static` exponents",
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

    @model_validator(mode="after")
    def _has_fields_of_one_method(self) -> Self:
        low, high = self.range.low, self.range.high
        if self.map == "sigmoid" and not 0 < low <= 1 <= high:
            raise ValueError(
                f"`map = sigmoid` has limits on both sides of 1, not `range = {low:g}..{high:g}`"
            )
        if self.map in ("sqrt", "log2") and "range" in self.model_fields_set:
            raise ValueError(f"`map = {self.map}` has no `range`: its factors have a mean of 1")
        if self.fit != "median" and {"xmin_pos", "convention"} & self.model_fields_set:
            raise ValueError(f"`xmin_pos` and `convention` are of `fit = median`, not `{self.fit}`")
        return self

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each weight's factor by definition, from singular values in float64."""
        import torch

        found = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            w = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
            ascending = torch.linalg.svdvals(w).square().flatten().sort().values
            found[name] = self._alpha(ascending)
        return self.balance(found)

    def _alpha(self, ascending: Tensor) -> float:
        """Return the exponent of a spectrum by definition."""
        n = len(ascending)
        if self.fit != "median":
            from trainc.kernels.parameter.tail_fit import fit_tail

            return fit_tail(ascending, self.fit).alpha
        if self.convention == "code":
            k = n - int(n / self.xmin_pos)
            xmin = ascending[n - k]
        else:
            k = int(n - n / self.xmin_pos)
            xmin = ascending[n - k - 1]
        return float(1 + k / (ascending[n - k :].log().sum() - k * xmin.log()))

    def balance(self, alphas: Mapping[str, float]) -> dict[str, float]:
        """Map the exponents to factors; without a spread all are 1."""
        limits = self.range.low, self.range.high
        return dict(zip(alphas, balance([*alphas.values()], 1.0, limits, self.map), strict=True))

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
        blocks = {group.block for group in groups if group.block is not None}
        units = len(groups) if self.unit == "module" else len(blocks)
        if units < 2:
            yield Problem(
                "no-effect",
                f"`lr temp_balance` needs two {self.unit}s that can be measured, but the selection has {units}",
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


@dataclass(eq=False)
class Balance(Action):
    """Phase 2: measure the exponents and set the factors; `pace` is a second gate besides the clause's."""

    phase = Phase.RATES
    reads_shards = True
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
        from trainc.runtime.processes.sharded import full

        if self.measurements and self.pace is not None and not self.pace.fires(step.clock):
            return
        measured = self._measure([full(step.parameters[group.weight]) for group in self.groups])
        keep, before = self.construct.smooth or 0.0, self.alphas
        self.alphas = {}
        for group, alpha in zip(self.groups, measured, strict=True):
            if math.isfinite(alpha):
                self.alphas[group.name] = keep * before.get(group.name, alpha) + (1 - keep) * alpha
            elif group.name in before or not self.measurements:
                reason = "is zero, not finite or of low rank, so its factor is 1"
                step.notes.append(f"{self.name}: `{group.weight}` {reason}")
        self._set_factors()
        self.first_spread = self.first_spread if self.measurements else self.spread
        self.measurements += 1
        self._record(step)

    def _set_factors(self) -> None:
        """Set the factors from the exponents, and let a control change what they follow."""
        of = self.construct
        if of.control == "static" and self.measurements:
            return
        blocks = {group.name: group.block for group in self.groups} if of.unit == "block" else None
        units, members = by_unit(self.alphas, blocks)
        found = of.balance(controlled(units, of.control, self.measurements))
        factors = {name: found[unit] for unit, names in members.items() for name in names}
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = factors.get(name, 1.0)

    def _measure(self, weights: Sequence[Tensor]) -> list[float]:
        """Return the exponent of each weight, NaN where it means nothing."""
        from trainc.kernels.parameter.spectrum import WHOLE, Hill, alphas, spectra
        from trainc.kernels.parameter.tail_fit import fit_tail

        of = self.construct
        if of.fit == "median":
            return alphas(weights, Hill(of.xmin_pos, of.convention))
        return [fit_tail(spectrum, of.fit).alpha for spectrum in spectra(weights, WHOLE)]

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

    def state_form(self) -> Form:
        entries: dict[str, Form] = {"measurements": Count(1), "first_spread": Number(0)}
        entries |= {f"factor/{name}": Number(0) for name in self.lr_factors}
        return Record(entries, {f"alpha/{name}": AnyNumber() for name in self.lr_factors})

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
