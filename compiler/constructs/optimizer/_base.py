"""What all optimizer constructs share: a learning rate, decay by selector, clipping, frozen parameters."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, Schedule, ScopedNumbers, Selector

if TYPE_CHECKING:
    import torch

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.held_updates import DecayForm


CLIPPING = Effect("gradients", "clip the gradients of its parameters", ("gradient",), ("gradient",))


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

    decay_form: ClassVar[DecayForm | None] = None
    """How the weights are decayed, where the update depends on them by their decay alone; None for any other."""

    lr: Schedule = Field(description="learning rate: a number or an expression of the clock")
    weight_decay: ScopedNumbers = Field(
        default=(),
        description="weight decay, for all parameters or by selector (`0.1 on matrices`)",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest L2 norm of the gradients of this clause's parameters together; they are scaled down to it"
        " just before the update. For all optimizers together: `clip` of `run`",
    )
    freeze: Selector | None = Field(default=None, description="parameters that do not train")

    @property
    def moments(self) -> float:
        """Return how many tensors of the parameter's size the state holds."""
        raise NotImplementedError(f"`{self.title}` does not say what its state holds")

    @property
    def moments_known(self) -> bool:
        """Return whether `moments` holds for every parameter, and is no guess."""
        return True

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it clips only when asked to."""
        return effect != CLIPPING or self.clip is not None

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""

    @abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""

    @property
    def asks(self) -> bool:
        """Whether `step` of the torch optimizer calls a closure for the loss and gradients."""
        return False

    @property
    def has_modes(self) -> bool:
        """Whether the torch optimizer has `train()` and `eval()`, and other weights for evaluation."""
        return False

    @property
    def own_decay(self) -> float:
        """The weight decay of the torch optimizer where `weight_decay` is not written."""
        return 0.0

    def lower(self, to: Lowering) -> None:
        """Claim the selected parameters, with the schedule and the decay of each."""
        frozen = set()
        if self.freeze is not None:
            frozen = {*to.select(self.freeze, "parameters")}
            to.freeze(frozen)
        trained = {name for name in to.clause.targets if name not in frozen}
        if not trained:
            raise FieldError("freeze", "`freeze` leaves nothing to train: freeze fewer parameters")
        unwritten = 0.0 if self.weight_decay else self.own_decay
        decay = dict.fromkeys(to.clause.targets, unwritten)
        for scoped in self.weight_decay:
            names = to.clause.targets if scoped.on is None else to.select(scoped.on, "parameters")
            if trained.isdisjoint(names):
                raise FieldError(
                    "weight_decay",
                    f"`{scoped}` decays nothing, because `freeze` selects all of it: remove it",
                )
            decay |= {name: float(scoped.value) for name in names if name in decay}
        claim = to.closure if self.asks else to.optimizer
        steady = to.is_constant(self.lr)
        claim(self, to.schedule(self.lr), decay, steady=steady, has_modes=self.has_modes)
