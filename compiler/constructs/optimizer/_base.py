"""Optimizers: any torch optimizer, with per-selector decay, clipping and rates that policies scale."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Schedule, ScopedNumbers, Selector

if TYPE_CHECKING:
    import torch

    from trainc.compiler.lower.lowering import Lowering


CLIPPING = Effect("gradients", "clip the global norm", ("gradient",), ("gradient",))


def implementation_flags(implementation: str) -> dict[str, bool]:
    """Return torch's keyword arguments for one of its implementations; none for `auto`."""
    flags = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False, "fused": False},
    }
    return flags.get(implementation, {})


class Optimizer(Construct):
    """What every optimizer clause declares; `make` builds the torch optimizer."""

    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("rates", "set each group's rate", ("clock", "rate"), ("rate",)),
        CLIPPING,
        Effect(
            "optimizer",
            "step",
            ("gradient", "rate", "optimizer_state"),
            ("params", "optimizer_state", "delta"),
        ),
    )

    moments: ClassVar[int] = 0
    """How many tensors of the parameter's size the state holds."""

    lr: Schedule = Field(description="learning rate: a number or an expression of the clock")
    weight_decay: ScopedNumbers = Field(
        default=(),
        description="decay coefficient, for all parameters or per selector (`0.1 on ndim(2)`)",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="global L2 norm the gradients are scaled down to, as the last gradient step",
    )
    freeze: Selector | None = Field(default=None, description="parameters to leave untrained")

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it clips only when asked to."""
        return effect != CLIPPING or self.clip is not None

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""

    @abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""

    def lower(self, to: Lowering) -> None:
        """Claim the parameters and hand over schedule and decay."""
        if self.freeze is not None:
            to.freeze(to.select(self.freeze, "parameters"))
        decay = dict.fromkeys(to.clause.targets, 0.0)
        for scoped in self.weight_decay:
            names = to.clause.targets if scoped.on is None else to.select(scoped.on, "parameters")
            decay |= {name: float(scoped.value) for name in names if name in decay}
        to.optimizer(self, to.schedule(self.lr), decay)
