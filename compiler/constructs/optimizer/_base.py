"""What all optimizer constructs share: a learning rate, decay by selector, clipping, frozen parameters."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Schedule, ScopedNumbers, Selector

if TYPE_CHECKING:
    import torch

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.held_updates import DecayForm


CLIPPING = Effect("gradients", "clip the global gradient norm", ("gradient",), ("gradient",))


Implementation = Annotated[
    Literal["auto", "fused", "foreach", "loop"],
    Field(description="which of torch's implementations runs; with `auto`, torch chooses"),
]


def implementation_flags(implementation: Implementation) -> dict[str, bool]:
    """Return torch's keyword arguments that choose an implementation; none for `auto`."""
    flags = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False, "fused": False},
    }
    return flags.get(implementation, {})


class Optimizer(Construct):
    """Base of the optimizer constructs; `make` builds the torch optimizer."""

    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("rates", "set the learning rate of each group", ("clock", "rate"), ("rate",)),
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
    decay_form: ClassVar[DecayForm | None] = None
    """How the weights are decayed, where the update depends on them by their decay alone; None for any other."""

    lr: Schedule = Field(description="learning rate: a number or an expression of the clock")
    weight_decay: ScopedNumbers = Field(
        default=(),
        description="weight decay, for all parameters or by selector (`0.1 on ndim(2)`)",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest global L2 norm of the gradients; they are scaled down to it just before the update",
    )
    freeze: Selector | None = Field(default=None, description="parameters that do not train")

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it clips only when asked to."""
        return effect != CLIPPING or self.clip is not None

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""

    @abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""

    def lower(self, to: Lowering) -> None:
        """Claim the selected parameters, with the schedule and the decay of each."""
        if self.freeze is not None:
            to.freeze(to.select(self.freeze, "parameters"))
        decay = dict.fromkeys(to.clause.targets, 0.0)
        for scoped in self.weight_decay:
            names = to.clause.targets if scoped.on is None else to.select(scoped.on, "parameters")
            decay |= {name: float(scoped.value) for name in names if name in decay}
        to.optimizer(self, to.schedule(self.lr), decay)
