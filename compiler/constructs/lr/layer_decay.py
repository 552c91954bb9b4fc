"""Layer-wise decay of the learning rate: the further from the head, the lower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem, Selector, ShrinkingFactor
from trainc.dsl.values.value_json import Glob

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import Inventory
    from trainc.runtime.schedule.clock import Clock

    Scheduled = Callable[[Clock], float]

SHOWN = 3


class LayerDecay(Construct):
    """Multiplies each learning rate by `max(decay ** (highest - level), floor)`.

    The level of embeddings is 0, blocks count from 1, and the head is the highest level: with L blocks the head keeps
    its rate, the last block gets `decay`, the first `decay ** L`, and the embeddings `decay ** (L + 1)`. Where a module
    stands is decided by what it is, then by its number: a head of several layers is one level, and so is what computes
    the input; each block of each stage is a level. A model with a method `group_matcher`, as models of timm have,
    says the levels itself.

    `levels` gives them instead, from the input to the head: one entry is one level, and an entry with patterns in
    which a part is `*` has a level for each name that they match, in the order of the model:
    `levels = ["stem", "stages.*.blocks.*" | "stages.*.downsample", "head"]`. `trainc plan` shows the level of every
    parameter. `decay` may move over the run: `decay = 0.5 + 0.5 * progress` trains the lower layers later. It holds for
    the whole run, so `from`, `until` and `every` are errors.
    """

    cite: ClassVar = "Bao et al., BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254"
    usage: ClassVar = "lr layer_decay on trainable { decay = 0.75 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    identity: ClassVar = {"decay": "1"}
    effects: ClassVar = (Effect("rates", "scale rates by level", writes=("rate",)),)

    decay: ShrinkingFactor = Field(
        description="factor from one level to the next lower one, above 0 and at most 1: a number or an expression of"
        " the clock"
    )
    floor: float = Field(default=0.0, ge=0, le=1, description="smallest factor")
    levels: tuple[Selector, ...] | None = Field(
        default=None,
        min_length=1,
        description="selectors of the levels from the input to the head. Default: by structure",
    )

    def reference(self, level: int, levels: int, decay: float) -> float:
        """Return the factor of a level by definition: one multiplication for each level above it."""
        factor = 1.0
        for _ in range(levels - level):
            factor *= decay
        return max(factor, self.floor)

    def factor(self, level: int, levels: int, decay: float) -> float:
        """Return the factor of a level where `decay` is what it is now."""
        return max(float(decay ** (levels - level)), self.floor)

    def level_of(self, inventory: Inventory) -> dict[str, tuple[int, int]]:
        """Return the level of each parameter that has one, and the highest level.

        Raises ValueError for a parameter that two entries of `levels` select.
        """
        if self.levels is None:
            return {p.name: (p.place.level, p.place.levels) for p in inventory.parameters}
        from trainc.compiler.model.select import leaves, repeated_part, select

        found: dict[str, int] = {}
        count = 0
        for entry in self.levels:
            patterns = [leaf.pattern for leaf in leaves(entry) if isinstance(leaf, Glob)]
            groups: dict[str, list[str]] = {}
            for name in select(entry, inventory, "parameters"):
                if name in found:
                    raise ValueError(
                        f"two entries of `levels` select `{name}`: the second is `{entry}`"
                    )
                parameter = inventory.parameter[name]
                parts = (part for p in patterns if (part := repeated_part(p, parameter)))
                groups.setdefault(next(parts, ""), []).append(name)
            for names in groups.values():
                found |= dict.fromkeys(names, count)
                count += 1
        return {name: (level, count - 1) for name, level in found.items()}

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Refuse entries of `levels` that overlap or leave parameters out, and warn where every rate is kept."""
        try:
            levels = self.level_of(bound.inventory)
        except ValueError as error:
            help = "change one of the two entries: each parameter has one level"
            yield Problem("claimed-twice", str(error), help=help, field="levels")
            return
        left = [p.name for p in bound.parameters if p.name not in levels]
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            names = ", ".join(f"`{name}`" for name in left[:SHOWN])
            help = f'add an entry for them, such as "{left[0].rpartition(".")[0] or left[0]}"'
            yield Problem(
                "bad-value", f"`levels` gives no level to {names}{more}", help=help, field="levels"
            )
            return
        highest = all(level == top for level, top in (levels[p.name] for p in bound.parameters))
        if bound.parameters and (highest or self.floor == 1):
            yield Problem(
                "no-effect",
                "every selected parameter is at the highest level, so every factor is 1"
                if highest
                else "`floor = 1` makes every factor 1",
                help="select blocks and embeddings as well" if highest else "write a lower `floor`",
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Give every level one factor, which moves where `decay` does."""
        from trainc.runtime.schedule.clock import Clock

        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        known = self.level_of(to.inventory)
        levels: dict[tuple[int, int], list[str]] = {}
        for parameter in to.parameters():
            levels.setdefault(known[parameter.name], []).append(parameter.name)
        decay = to.schedule(self.decay)
        constant = decay(Clock()) if to.is_constant(self.decay) else None
        if constant is None:
            to.show("decay", decay)
        for (level, count), names in levels.items():
            factor = to.lr_factor(f"level {level}", names)
            if constant is not None:
                factor.factor = self.factor(level, count, constant)
            else:
                factor.schedule = partial(self._at, level, count, decay)

    def _at(self, level: int, levels: int, decay: Scheduled, clock: Clock) -> float:
        """Return the factor of a level in the step at a clock."""
        return self.factor(level, levels, decay(clock))
