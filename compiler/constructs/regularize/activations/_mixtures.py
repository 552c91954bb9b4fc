"""What mixtures of examples share: when they are made, and in which parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Fraction

if TYPE_CHECKING:
    from trainc.compiler.constructs.regularize.activations._mix_pairs import Mix
    from trainc.compiler.lower.lowering import Lowering
    from trainc.dsl.values.value_json import Expr

Share = Literal["step", "example"]


class Mixture(Construct):
    """Base of constructs that mix each example with another one of its micro-batch."""

    identity: ClassVar = {"alpha": "0"}
    effects: ClassVar = (
        Effect("perturb", "mix pairs of examples", ("inputs", "clock"), ("inputs",)),
    )
    division: ClassVar = "an example is mixed with another one of its micro-batch"

    share: Share = Field(
        default="step",
        description="whether all examples of a step have one mixture, as published, or each has its own",
    )
    probability: Fraction = Field(
        default=1.0, ge=0, le=1, description="probability that a step is mixed at all"
    )

    def lower_with(self, to: Lowering, alpha: Expr, mix: Mix) -> None:
        """Let `mix` mix every micro-batch before its first pass."""
        from trainc.compiler.constructs.regularize.activations._mix_pairs import MixPairs

        to.batch(MixPairs(to.label, to.schedule(alpha), self.probability, self.share, mix))
