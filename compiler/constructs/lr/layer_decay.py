"""Layer-wise decay of the rate: the further from the head, the slower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from trainc.compiler.bound import Targets
    from trainc.compiler.lowering import Lowering


class LayerDecay(Construct):
    """Multiplies each rate by `max(decay ** (levels - level), floor)`.

    Levels count embeddings as 0, blocks from 1, and the head as the last: with L blocks the head keeps its rate,
    the last block gets `decay`, the first `decay ** L`, the embeddings `decay ** (L + 1)`.
    """

    cite: ClassVar = (
        "Bao et al., BEiT, ICLR 2022, arXiv:2106.08254; Clark et al., ELECTRA, ICLR 2020, arXiv:2003.10555"
    )
    example: ClassVar = "lr layer_decay on trainable { decay = 0.75 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    identity: ClassVar = {"decay": "1"}
    effects: ClassVar = (Effect("rates", "scale rates by level", writes=("rate",)),)

    decay: float = Field(gt=0, le=1, description="factor from one level to the next below it, no unit")
    floor: float = Field(default=0.0, ge=0, le=1, description="smallest factor, no unit (timm's `min_scale`)")

    def reference(self, level: int, levels: int) -> float:
        """Return the factor of a level, one multiplication per level below the head."""
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
        if places and all(self.factor(place.level, place.levels) == 1.0 for place in places):
            yield Problem(
                "no-effect",
                "every selected parameter is at the top level, whose factor is 1",
                notes=(f"the model has {places[0].levels + 1} levels, the head is the last",),
                help="select the blocks and embeddings as well",
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every level one factor, for the whole run."""
        clause = to.clause
        if clause.start or clause.stop or clause.every:
            raise ValueError(f"`{to.label}` holds for the whole run: it takes no `from`, `until` or `every`")
        levels: dict[tuple[int, int], list[str]] = {}
        for parameter in to.parameters():
            place = parameter.place
            levels.setdefault((place.level, place.levels), []).append(parameter.name)
        for (level, count), names in levels.items():
            to.scale(f"level {level}", names).factor = self.factor(level, count)
