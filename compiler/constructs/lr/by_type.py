"""Static multipliers of the learning rate: one number for each kind of parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem, ScopedNumbers

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class ByType(Construct):
    """Multiplies each learning rate by the number that `factors` has for the parameter; others keep theirs.

    `factors = [5 on type(Embedding), 2.5 on "**.mlp.**", 0.5 on role(norm)]` gives each selector its number; no two may
    select the same parameter. Numbers are above 0. A policy that measures, such as by spectra, should do better than
    such constants: run them beside it. LoRA+ is one line, `factors = 16 on "**.lora_B"`. The factors hold for the whole
    run, so `from`, `until` and `every` are errors; factors of other `lr` clauses multiply.
    """

    cite: ClassVar = (
        "Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, ICML 2024, arXiv:2402.12354,"
        " for a factor on one kind of parameter"
    )
    usage: ClassVar = "lr by_type { factors = [2 on type(LayerNorm), 0.5 on ndim(2)] }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    identity: ClassVar = {"factors": "1"}
    effects: ClassVar = (Effect("rates", "scale rates by kind", writes=("rate",)),)

    factors: ScopedNumbers = Field(
        description="factor of the rate by selector, as in `[5 on type(Embedding), 2 on ndim(2)]`"
    )

    @field_validator("factors", mode="after")
    @classmethod
    def _is_above_zero(cls, value: ScopedNumbers) -> ScopedNumbers:
        for scoped in value:
            if not scoped.number > 0:
                raise ValueError(
                    f"`{scoped}` stops what it selects from training: write a number above 0, or the selector in"
                    " `freeze` of the optimizer"
                )
        return value

    def reference(self, matches: Mapping[str, Iterable[str]]) -> dict[str, float]:
        """Return the factor of each name in `matches`, the names by the text of an entry's selector."""
        return {
            name: float(scoped.number)
            for scoped in self.factors
            for name in matches[str(scoped.on)]
        }

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn where every number is 1."""
        if all(scoped.number == 1 for scoped in self.factors):
            yield Problem("no-effect", "every factor is 1", field="factors", severity="warning")

    def lower(self, to: Lowering) -> None:
        """Give what each entry selects one factor."""
        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        for scoped in self.factors:
            names = (
                [entry.name for entry in to.parameters()]
                if scoped.on is None
                else to.select(scoped.on, "parameters")
            )
            to.lr_factor(str(scoped.on or "all"), names).factor = float(scoped.number)
