"""Layer-wise decay of the learning rate: the further from the head, the lower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class LayerDecay(Construct):
    """Multiplies each learning rate by `max(decay ** (levels - level), floor)`.

    The level of embeddings is 0, blocks count from 1, and the head is the last level: with L blocks
    the head keeps its rate, the last block gets `decay`, the first `decay ** L`, and the embeddings
    `decay ** (L + 1)`. The factors hold for the whole run, so `from`, `until` and `every` are errors.
    """

    cite: ClassVar = "Bao et al., BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254"
    usage: ClassVar = "lr layer_decay on trainable { decay = 0.75 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    identity: ClassVar = {"decay": "1"}
    effects: ClassVar = (Effect("rates", "scale rates by level", writes=("rate",)),)

    decay: float = Field(gt=0, le=1, description="factor from one level to the next lower one")
    floor: float = Field(default=0.0, ge=0, le=1, description="smallest factor")

    def reference(self, level: int, levels: int) -> float:
        """Return the factor of a level by definition: one multiplication for each level above it."""
        factor = 1.0
        for _ in range(levels - level):
            factor *= self.decay
        return max(factor, self.floor)

    def factor(self, level: int, levels: int) -> float:
        """Return the factor of a level."""
        return max(float(self.decay ** (levels - level)), self.floor)

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn when every selected parameter keeps its rate."""
        places = [parameter.place for parameter in bound.parameters]
        if places and all(self.factor(place.level, place.levels) == 1 for place in places):
            yield Problem(
                "no-effect",
                "every selected parameter is at the highest level, so every factor is 1",
                help="select blocks and embeddings as well",
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every level one factor."""
        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        levels: dict[tuple[int, int], list[str]] = {}
        for parameter in to.parameters():
            place = parameter.place
            levels.setdefault((place.level, place.levels), []).append(parameter.name)
        for (level, count), names in levels.items():
            to.lr_factor(f"level {level}", names).factor = self.factor(level, count)
