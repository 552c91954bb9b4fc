"""What masks share that start at random and replace some of their entries again and again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.constructs.mask._base import OVERLAP, ZEROS_AGAIN, PicturedMask
from trainc.dsl.reading.construct import Effect, Fraction, Problem, Proportion
from trainc.dsl.values.value_json import Binary, Call, Number

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.regrow import Growth


EVERY_STEPS = 100
"""How often entries are replaced where a clause does not say."""


class Regrowing(PicturedMask):
    """Base of the masks that drop the smallest entries and let others train; `growth` says which."""

    targets: ClassVar = "parameters"
    identity: ClassVar = {"density": "100%"}
    signals: ClassVar = OVERLAP
    effects: ClassVar = (
        *ZEROS_AGAIN,
        Effect(
            "reduce",
            "drop the smallest entries, let others train",
            ("gradient", "params", "optimizer_state", "clock"),
            ("params", "optimizer_state", "gradient", "metrics", "signal:overlap"),
        ),
    )

    density: Fraction = Field(description="fraction of the entries that trains, above 0%")
    scope: Literal["erk", "tensor"] = Field(
        default="erk",
        description="whether `density` is of all tensors together, denser in small ones (Erdos-Renyi-Kernel), or of"
        " each",
    )
    replace: Proportion = Field(
        default=Binary("*", Number(0.3), Call("cosine")),
        description="fraction of the entries that train which is replaced at a time",
    )

    @field_validator("density")
    @classmethod
    def _is_positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("expected a fraction above 0%")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report frozen parameters, which have no gradient."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = f"`{frozen[0]}` is frozen, so its entries cannot be replaced in training"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")

    def growth(self, seed: int) -> Growth:
        """Return what gives the entries a score by which they grow."""
        raise NotImplementedError

    def lower(self, to: Lowering) -> None:
        """Choose entries at random at the start, and replace some at the clause's times."""
        from trainc.runtime.mask.budget import erk_densities
        from trainc.runtime.mask.entry_choice import Choice
        from trainc.runtime.mask.regrow import Regrow
        from trainc.runtime.mask.scores import Random, ScoredChoice
        from trainc.runtime.schedule.gate import Gate
        from trainc.runtime.schedule.time_span import TimeSpan

        names = [entry.name for entry in to.parameters()]
        choice = Choice(allocate=erk_densities if self.scope == "erk" else None)
        first = ScoredChoice(to.label, names, Random(to.seed("start")), choice)
        zeros = to.mask(names, first, Number(self.density), choice=choice, once=True)
        fraction = to.schedule(self.replace)
        to.show("replace", fraction)
        pace = None if to.clause.every else Gate(every=TimeSpan(EVERY_STEPS, "steps"))
        to.action(Regrow(to.label, zeros, self.growth(to.seed("growth")), fraction, pace))

    @staticmethod
    def reference(weight: Tensor, kept: Tensor, growth: Tensor, count: int) -> Tensor:
        """Return which entries train after a replacement, bool, by sorting all entries."""
        size, grow, trains = (one.flatten().tolist() for one in (weight.abs(), growth, kept))
        ranked = sorted((-size[i], i) for i in range(len(size)) if trains[i])
        staying = {i for _, i in ranked[: len(ranked) - count]}
        others = sorted((-grow[i], i) for i in range(len(size)) if i not in staying)
        staying |= {i for _, i in others[:count]}
        new = weight.new_tensor([float(i in staying) for i in range(len(size))])
        return new.view(weight.shape) > 0
