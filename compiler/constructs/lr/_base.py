"""What all policies that measure share: the groups of a selection, from figures to factors, and the times."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.lr._groups import find_groups
from trainc.dsl.reading.construct import Construct, Effect, Problem, Range
from trainc.dsl.values import value_json as v
from trainc.runtime.factors.maps import Map, balance
from trainc.runtime.factors.units import BalancedGroup, Control, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry

# How often to measure where the clause does not say.
EVERY_STEPS = 100


class MeasuredPolicy(Construct):
    """Base of the policies that measure weights: `measure` gives a figure of each, and these become factors."""

    targets: ClassVar = "parameters"
    identity: ClassVar = {"range": "1..1"}
    functions: ClassVar[tuple[str, ...]] = ("trainc.runtime.factors.maps:balance",)
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
    def _has_fields_of_one_map(self) -> Self:
        low, high = self.range.low, self.range.high
        if self.map == "sigmoid" and not 0 < low <= 1 <= high:
            raise ValueError(
                f"`map = sigmoid` has limits on both sides of 1, not `range = {low:g}..{high:g}`"
            )
        if self.map in ("sqrt", "log2") and "range" in self.model_fields_set:
            raise ValueError(f"`map = {self.map}` has no `range`: its factors have a mean of 1")
        return self

    @abstractmethod
    def measure(self, weights: Sequence[Tensor]) -> list[float]:
        """Return the figure of each weight, NaN where it means nothing."""

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
                f"`{self.title}` needs two {self.unit}s that can be measured, but the selection has {units}",
                field="min_eigenvalues" if few else None,
                notes=tuple(f"`{u.name}` has {u.eigenvalues} eigenvalues" for u in few[:5]),
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every group a factor, and measure before the optimizer's rates are set."""
        from trainc.runtime.factors.action import BalanceFactors
        from trainc.runtime.schedule.gate import Gate
        from trainc.runtime.schedule.time_span import TimeSpan

        groups, few = self.groups(to.parameters())
        lr_factors = {
            group.name: to.lr_factor(group.name, group.parameters, holds=True) for group in groups
        }
        pace = None if to.clause.every else Gate(every=TimeSpan(EVERY_STEPS, "steps"))
        to.action(BalanceFactors(to.label, self, groups, lr_factors, few, pace))
