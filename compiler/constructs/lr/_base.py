"""What all policies that measure share: the groups of a selection, from figures to factors, and the times."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.lr._cost import MeasuredAtTimes, read
from trainc.compiler.constructs.lr._groups import find_groups, show_measured, slice_factors
from trainc.dsl.reading.construct import Duration, Effect, Problem, Range, Selector
from trainc.dsl.values import value_json as v
from trainc.runtime.factors.maps import Map, balance
from trainc.runtime.factors.noise import noise_of_means, spread_gain
from trainc.runtime.factors.units import (
    BalancedGroup,
    Control,
    MeasuredPart,
    Unit,
    apart,
    by_unit,
    unit_means,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import Inventory, ParameterEntry
    from trainc.compiler.structure.weights import By
    from trainc.kernels.parameter.spectrum import Gram
    from trainc.runtime.step.optimizer import LrFactor

Split = Literal["whole", "parts", "heads"]
_STORED = "one matrix, as `split = whole` says"
_WRITTEN = ("rate", "metrics", "signal:spread", "signal:alpha", "signal:gain")
_BY: dict[Split, By] = {"whole": "whole", "parts": "part", "heads": "head"}


class MeasuredPolicy(MeasuredAtTimes):
    """Base of the policies that measure weights: `measure` gives a figure of each, and these become factors.

    A construct of its own needs `measure`, and `levels` where the noise of its figures is known.
    """

    scales: ClassVar[Literal["lr", "weight_decay"]] = "lr"
    """What the factors are on."""
    every_steps: ClassVar[int] = 100
    """How often to measure where the clause does not say."""

    targets: ClassVar = "parameters"
    identity: ClassVar = {"range": "1..1"}
    functions: ClassVar[tuple[str, ...]] = (
        "trainc.runtime.factors.maps:balance",
        "trainc.runtime.factors.noise:spread_gain",
    )
    signals: ClassVar = {
        "spread": "standard deviation of alpha over the measured modules",
        "alpha": "mean alpha over the measured modules",
        "gain": "how much of the factors is kept: 0 where noise explains the spread of alpha, 1 without noise",
    }
    effects: ClassVar[tuple[Effect, ...]] = (
        Effect("rates", "measure spectra and set factors", ("params", "clock"), _WRITTEN),
        Effect("deltas", "scale slices of updates", ("params", "delta"), ("delta",), lasting=True),
        Effect("exchange", "wait for what is measured beside the step", ("clock",), _WRITTEN),
    )

    map: Map = Field(
        default="linear",
        description="how factors follow from alpha: `linear`, `sqrt`, `log2`, `step` or `sigmoid`",
    )
    range: Range = Field(
        default=v.Range(0.5, 1.5),
        description="factors of the smallest and the largest alpha; `sqrt` and `log2` do not use it",
    )
    unit: Unit = Field(
        default="module",
        description="what has a factor of its own: a `module`, a `block` or a `type`, with the mean over all that is"
        " measured in it, or each `part` that `split` measures, such as a head",
    )
    split: Split = Field(
        default="parts",
        description="what has a spectrum: queries, keys and values of a fused projection, experts and gates each"
        " (`parts`), also each head of attention (`heads`), or every weight as it is stored (`whole`), as published",
    )
    shrink: bool = Field(
        default=True,
        description="whether factors come closer to 1 the more of alpha's spread is noise; `false` is as published",
    )
    normalize: bool = Field(
        default=False, description="whether factors are divided by their mean over the units"
    )
    limits: Range | None = Field(
        default=None, description="limits of the factors, after all else. Default: none"
    )
    highest: Selector | None = Field(
        default=None,
        description="parameters of the selection that are not measured and get the highest factor, such as"
        " embeddings. Default: none",
    )
    follow: bool = Field(
        default=False,
        description="whether vectors of modules without a matrix, such as norms, share the factor of the module before"
        " them in their block",
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
    hysteresis: float = Field(
        default=0.0,
        ge=0,
        description="a factor stays until a measurement asks for one that differs by more than this",
    )
    ramp: Duration | None = Field(
        default=None,
        description="how long a factor takes to its new value, on a straight line. Default: at once",
    )
    skip_first: bool = Field(
        default=False, description="leave out the first selected module, in registration order"
    )
    skip_last: bool = Field(
        default=False, description="leave out the last selected module, in registration order"
    )

    @field_validator("range", "limits", mode="after")
    @classmethod
    def _is_not_negative(cls, value: Range | None) -> Range | None:
        if value is not None and value.low < 0:
            raise ValueError(f"a factor cannot be negative: {value.low:g}")
        return value

    @field_validator("ramp", mode="after")
    @classmethod
    def _takes_time(cls, value: Duration | None) -> Duration | None:
        if value is not None and not value.amount:
            raise ValueError("a ramp needs a duration above 0: leave it out for factors that jump")
        return value

    @model_validator(mode="after")
    def _has_fields_of_one_map(self) -> Self:
        low, high = self.range.low, self.range.high
        if self.map == "sigmoid" and not 0 < low <= 1 <= high:
            raise ValueError(
                f"`map = sigmoid` has limits on both sides of 1, not `range = {low:g}..{high:g}`"
            )
        if self.unit == "part" and (self.split == "whole" or self.scales != "lr"):
            what = (
                "`split = whole` has one part"
                if self.scales == "lr"
                else "a parameter has one decay"
            )
            raise ValueError(f"{what}: write `unit = module` in place of `unit = part`")
        if self.map in ("sqrt", "log2") and "range" in self.model_fields_set:
            raise ValueError(f"`map = {self.map}` has no `range`: its factors have a mean of 1")
        return self

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: parts have factors of their own, or it measures beside steps."""
        return {"deltas": self.unit == "part", "exchange": self.beside}.get(effect.phase, True)

    @abstractmethod
    def measure(self, matrices: Mapping[str, Any]) -> dict[str, float]:
        """Return the figure of each weight, or part of one, from its matrices (count, out, in); NaN where it has none.

        Raises ValueError, which names the weight, for entries that are not finite.
        """

    def levels(
        self, figures: Mapping[str, float], parts: Sequence[MeasuredPart]
    ) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return figures that compare over shapes, and their standard deviations by chance; None if not known."""
        return None

    def gain(
        self,
        figures: Mapping[str, float],
        parts: Sequence[MeasuredPart],
        members: Mapping[str, list[str]],
    ) -> float:
        """Return how much of the factors to keep: see `spread_gain`."""
        found = self.levels(figures, parts) if self.shrink else None
        if found is None:
            return 1.0
        levels, noise = unit_means(found[0], members), noise_of_means(found[1], members)
        return spread_gain([*levels.values()], [noise[unit] for unit in levels])

    def factors(self, figures: Mapping[str, float], gain: float = 1.0) -> dict[str, float]:
        """Return the factor of each unit from its figure: by the map, the gain, `normalize` and `limits`."""
        range_ = self.range.low, self.range.high
        mapped = balance([*figures.values()], 1.0, range_, self.map)
        found = [1 + gain * (factor - 1) for factor in mapped]
        if self.normalize and (total := sum(found)):
            found = [factor * len(found) / total for factor in found]
        if self.limits is not None:
            low, high = self.limits.low, self.limits.high
            found = [min(max(factor, low), high) for factor in found]
        return dict(zip(figures, found, strict=True))

    def groups(
        self, parameters: Iterable[ParameterEntry], inventory: Inventory
    ) -> tuple[list[BalancedGroup], list[BalancedGroup]]:
        """Return the groups to balance, and those that have too few eigenvalues for it."""
        groups, _ = self._found(parameters, inventory)
        kept = groups[int(self.skip_first) : len(groups) - int(self.skip_last)]
        least = self.min_eigenvalues
        few = [group for group in kept if group.eigenvalues < least]
        return [group.without_small_parts(least) for group in kept if group not in few], few

    def _found(
        self, parameters: Iterable[ParameterEntry], inventory: Inventory
    ) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
        highest = self._highest(inventory)
        measured = [p for p in parameters if p.name not in highest]
        return find_groups(measured, inventory, self._by, self.follow)

    @property
    def _by(self) -> By:
        return _BY[self.split]

    def _highest(self, inventory: Inventory) -> set[str]:
        """Return the parameters that get the highest factor."""
        if self.highest is None:
            return set()
        from trainc.compiler.model.select import select

        return set(select(self.highest, inventory, "parameters"))

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Object to parameters without a spectrum; warn where fewer than two modules are left to balance."""
        _, unfit = self._found(bound.parameters, bound.inventory)
        if unfit:
            shown = ", ".join(f"`{p.name}` {list(p.shape)}" for p in unfit[:5])
            yield Problem(
                "wrong-target-kind",
                f"these parameters have no spectrum: {shown}{', ...' if len(unfit) > 5 else ''}",
                notes=("a spectrum needs a weight of matrices that is not an embedding",),
                help="exclude them from `on`, for instance with `- type(Embedding) - role(norm)`, or write"
                " `follow = true` for norms and `highest = type(Embedding)` for embeddings",
            )
        if self.highest is not None and not any(
            p.name in self._highest(bound.inventory) for p in bound.parameters
        ):
            yield Problem(
                "no-effect",
                f"`highest = {self.highest}` selects nothing of what `on` selects",
                field="highest",
                help="add it to `on`: `highest` says which of the selected parameters are not measured",
            )
        if self.bounds is not None and self.hysteresis >= max(
            1 - self.bounds[0], self.bounds[1] - 1
        ):
            low, high = self.bounds
            yield Problem(
                "no-effect",
                f"factors stay 1: between {low:g} and {high:g} none differs from 1 by more than"
                f" {self.hysteresis:g}",
                field="hysteresis",
                help="write a smaller number, such as 0.05",
            )
        groups, few = self.groups(bound.parameters, bound.inventory)
        units = len(by_unit(apart(groups, self.unit), self.unit))
        if units < 2:
            yield Problem(
                "no-effect",
                f"`{self.title}` needs two {self.unit}s that can be measured, but the selection has {units}",
                field="min_eigenvalues" if few else None,
                notes=tuple(f"`{u.name}` has {u.eigenvalues} eigenvalues" for u in few[:5]),
                severity="warning",
                help="write a smaller number"
                if few
                else "select more in `on`, or remove the clause",
            )

    def lower(self, to: Lowering) -> None:
        """Give every group a factor, and measure before the optimizer's rates are set."""
        from trainc.compiler.structure.weights import find_units
        from trainc.runtime.factors.action import AwaitFigures, BalanceFactors
        from trainc.runtime.factors.course import Course
        from trainc.runtime.schedule.gate import Gate
        from trainc.runtime.schedule.time_span import TimeSpan

        groups, few = self.groups(to.parameters(), to.inventory)
        chosen = {part.weight for group in groups for part in group.parts}
        found = find_units(to.inventory.weights, self._by)
        units = {unit.name: unit for unit in found if unit.name in chosen}
        stored = "" if self.split != "whole" else _STORED
        show_measured(to, units.values(), self._by, stored, apart=self.unit == "part")
        model, grams = to.model, self.takes_grams

        def read_parts(names: Sequence[str]) -> dict[str, Tensor | Gram]:
            return read(model, [units[name] for name in names], grams)

        of_parts: dict[str, LrFactor] = {}
        if self.unit == "part":
            of_parts = slice_factors(to, groups, units, self._by, self.bounds)
        groups = apart(groups, self.unit)
        scaled = {group.name: group.parameters for group in groups}
        top = None
        if self.highest is not None:
            top, given = str(self.highest), self._highest(to.inventory)
            scaled[top] = tuple(p.name for p in to.parameters() if p.name in given)
        unit_of = {group.name: group.unit(self.unit) or group.name for group in groups}
        factors = {
            name: of_parts.get(name) or self._factor(to, unit_of.get(name, name), names)
            for name, names in scaled.items()
        }
        own = None if self.budget else Gate(every=TimeSpan(self.every_steps, "steps"))
        pace = None if to.clause.every else own
        ramp = None if self.ramp is None else to.window(None, None, self.ramp).every
        course = Course(tuple(scaled), self.hysteresis, ramp)
        times = pace, course, top, self.measuring(to.label)
        action = BalanceFactors(to.label, self, read_parts, groups, factors, few, *times)
        to.action(action)
        if self.beside:
            to.action(AwaitFigures(action))

    def _factor(self, to: Lowering, unit: str, names: Iterable[str]) -> LrFactor:
        """Return the factor of a unit, on what this policy scales."""
        if self.scales == "lr":
            factor = to.lr_factor(unit, names, holds=True)
        else:
            factor = to.option_factor(self.scales, unit, names, holds=True)
        factor.limits = self.bounds
        return factor

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Return between which numbers the factors stay, 1 among them; None where that depends on the figures."""
        cut = self.limits
        if self.normalize or self.map in ("sqrt", "log2"):
            return None if cut is None else (min(cut.low, 1.0), max(cut.high, 1.0))
        low, high = self.range.low, self.range.high
        if cut is not None:
            low, high = (min(max(end, cut.low), cut.high) for end in (low, high))
        return min(low, 1.0), max(high, 1.0)
