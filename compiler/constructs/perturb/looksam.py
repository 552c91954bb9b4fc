"""LookSAM: SAM whose second pass runs once in a while, and whose effect on the gradient is kept in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.perturb._base import (
    UNDO,
    KeptAscent,
    TwoPasses,
    norm_of,
    sizes_of,
    trained_names,
)
from trainc.dsl.reading.construct import Effect, Period, Schedule
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.gradients import GradientTransform, ParameterGradient

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.update_mask import TrainedEntries
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.record import Step


class LookSam(TwoPasses):
    """Takes a step of SAM once in `refresh`, and adds what was new in its gradient to those in between.

    At a refresh, with g the gradient at w and s that at w + rho g / |g|, the weights are updated with
    s, and its part at right angles to g is kept: v = s - (s.g / |g|^2) g. In the steps between, the
    update is with g + alpha |g| / |v| v, from one pass. Norms and products run over all parameters
    that train; the step of length `rho` is of the selected ones. Clipping sees the gradient that is
    used; statistics are of the passes as they are. w comes back bit for bit before the update. A g
    that is not finite keeps the v of before. A refresh costs two steps, the others one; v takes the
    memory of the weights, and checkpoints hold it.
    """

    cite: ClassVar = (
        "Liu, Mai, Chen, Hsieh, You, Towards Efficient and Scalable Sharpness-Aware Minimization, "
        "CVPR 2022, arXiv:2203.02714"
    )
    usage: ClassVar = "perturb looksam { rho = 0.05, alpha = 0.7, refresh = 5 steps }"
    identity: ClassVar = {"rho": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "at a refresh, move the weights up the gradient of a first pass",
            ("params", "inputs", "clock"),
            ("params",),
        ),
        UNDO,
        Effect("gradients", "add the part that was kept", ("gradient", "clock"), ("gradient",)),
    )

    rho: Schedule = Field(description="length of the step from the weights, 0 or more")
    alpha: float = Field(
        ge=0, description="size of the part that is added between, relative to the gradient"
    )
    refresh: Period = Field(description="how often the second pass runs, from the first step on")

    def lower(self, to: Lowering) -> None:
        """Surround the passes of a refresh, and change the gradients of every step."""
        to.refuse_times("`refresh` says how often the second pass runs", "every")
        entries, due = to.trained_entries(), to.window(None, None, self.refresh)
        rho = to.schedule(self.rho)
        ascent = RefreshedAscent(to.label, rho, sizes_of(to), due)
        ascent.added = Added(f"{to.label}.added", self, rho, ascent, entries)
        to.around(ascent)
        to.gradient(ascent.added, trained_names(to))

    def reference(
        self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return v of the gradients at w and at the moved weights, by definition."""
        part = inner(first, second) / max(inner(first, first), 1e-300)
        return {name: s - part * first[name] if name in first else s for name, s in second.items()}


def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the inner product over the parameters of both."""
    from trainc.runtime.processes.sharded import inner_products

    both = [name for name in left if name in right]
    if not both:
        return 0.0
    return float(inner_products([left[n] for n in both], [right[n] for n in both]).sum())


class RefreshedAscent(KeptAscent):
    """Moves the weights at a refresh, and while there is no part to add."""

    added: Added

    def __init__(
        self, name: str, rho: Callable[[Clock], float], sizes: Mapping[str, int], due: Gate
    ) -> None:
        super().__init__(name, rho, sizes)
        self.due = due

    def is_wanted(self, step: Step, length: float) -> bool:
        """Return whether this step is a refresh."""
        return bool(length) and (not self.added.parts or self.due.fires(step.clock))


class Added(GradientTransform):
    """Keeps the part of a refresh's gradient that is at right angles to the first, and adds it between."""

    takes_shards = True

    def __init__(
        self,
        name: str,
        method: LookSam,
        rho: Callable[[Clock], float],
        ascent: KeptAscent,
        entries: TrainedEntries,
    ) -> None:
        self.name, self.method, self.rho = name, method, rho
        self.ascent, self.entries = ascent, entries
        self.parts: dict[str, Tensor] = {}
        """v, by parameter, in the parameters' shapes."""

    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        """Keep v at a refresh; otherwise add alpha |g| / |v| v."""
        now = {one.name: one.gradient for one in gradients}
        if self.ascent.first:
            self._keep(now)
        elif self.parts and self.rho(step.clock):
            self._add(now)
        self.ascent.forget()

    def _keep(self, second: Mapping[str, Tensor]) -> None:
        first = {n: self.entries.picked(n, g) for n, g in self.ascent.first.items()}
        parts = self.method.reference(first, second)
        if math.isfinite(norm_of(parts.values())):
            self.parts = {n: self.entries.whole(n, v).clone() for n, v in parts.items()}

    def _add(self, now: Mapping[str, Tensor]) -> None:
        from trainc.runtime.processes.sharded import shard_like

        kept = {n: self.entries.picked(n, self.parts[n]) for n in now if n in self.parts}
        parts = {n: shard_like(part, now[n]) for n, part in kept.items()}
        length = norm_of(parts.values()) if parts else 0.0
        if not length:
            return
        factor = self.method.alpha * norm_of(now.values()) / length
        for name, part in parts.items():
            now[name].add_(part.to(now[name].dtype), alpha=factor)

    def state_dict(self) -> ActionState:
        """Return v."""
        return {name: v.clone() for name, v in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore v."""
        self.parts = {name: v.clone() for name, v in state.items()}

    def memory(self) -> int:
        """Return the bytes of v."""
        return sum(self.ascent.sizes.values())
