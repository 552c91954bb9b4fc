"""TempBalance: learning rates by the tail of each weight's spectrum, higher for lighter tails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem, Range
from trainc.dsl.values import value_json as v

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.constructs.lr._temp_balance import BalancedGroup
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry

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
        from trainc.compiler.constructs.lr._temp_balance import find_groups

        groups, _ = find_groups(parameters)
        kept = groups[int(self.skip_first) : len(groups) - int(self.skip_last)]
        few = [group for group in kept if group.eigenvalues < self.min_eigenvalues]
        return [group for group in kept if group not in few], few

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Object to parameters without a spectrum; warn where fewer than two modules are left to balance."""
        from trainc.compiler.constructs.lr._temp_balance import find_groups

        _, unfit = find_groups(bound.parameters)
        if unfit:
            shown = ", ".join(f"`{p.name}` {list(p.shape)}" for p in unfit[:5])
            yield Problem(
                "wrong-target-kind",
                f"no spectrum can be taken of {shown}{', ...' if len(unfit) > 5 else ''}",
                notes=("a spectrum needs a 2-D or 4-D weight that is not an embedding",),
                help="narrow the selection, for instance with `- type(Embedding) - role(norm)`",
            )
        groups, few = self.groups(bound.parameters)
        if len(groups) < 2:
            yield Problem(
                "no-effect",
                f"`lr temp_balance` needs two modules that can be measured, and the selection has {len(groups)}",
                field="min_eigenvalues" if few else None,
                notes=tuple(f"`{u.name}` has {u.eigenvalues} eigenvalues" for u in few[:5]),
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every group a factor, and measure before the optimizer's rates are set."""
        from trainc.compiler.constructs.lr._temp_balance import Balance
        from trainc.runtime.schedule.gate import Gate
        from trainc.runtime.schedule.time_span import TimeSpan

        groups, few = self.groups(to.parameters())
        lr_factors = [to.lr_factor(group.name, group.parameters) for group in groups]
        pace = None if to.clause.every else Gate(every=TimeSpan(EVERY_STEPS, "steps"))
        to.action(Balance(to.label, self, groups, lr_factors, few, pace))
