"""What all optimizer constructs share: a learning rate, decay by selector, clipping, frozen parameters."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, ScopedSchedules, Selector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.entry_updates import Chosen
    from trainc.runtime.step.held_updates import DecayForm
    from trainc.runtime.step.optimizer import OptionValues


SHOWN = 3
CLIPPING = Effect("gradients", "clip the gradients of its parameters", ("gradient",), ("gradient",))


Implementation = Annotated[
    Literal["auto", "fused", "foreach", "loop"],
    Field(description="which of torch's implementations runs; with `auto`, torch chooses"),
]


def implementation_flags(implementation: Implementation) -> dict[str, Any]:
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

    entrywise: ClassVar[bool] = True
    """Whether the update of an entry depends on its own gradients alone, so that it can be trained by itself."""

    scheduled: ClassVar[tuple[str, ...]] = ()
    """Fields, besides `lr` and `weight_decay`, that are options of torch's parameter groups and may be schedules."""

    lr: ScopedSchedules = Field(
        description="learning rate: a number or an expression of the clock and of a parameter's place; for all"
        " parameters, or by selector, which then have to reach each of them"
    )
    weight_decay: ScopedSchedules = Field(
        default=(),
        description="weight decay, a number or an expression, for all parameters or by selector (`0.1 on matrices`)",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest L2 norm of the gradients of this clause's parameters together; they are scaled down to it"
        " just before the update. For all optimizers together: `clip` of `run`",
    )
    freeze: Selector | None = Field(default=None, description="parameters that do not train")

    may_stay: ClassVar[bool] = False
    """Whether a step may leave the weights where they are, because it found no better ones."""

    follows_gradient: ClassVar[bool] = False
    """Whether the update is in proportion to the gradient."""

    def update_norm(self, out: float, into: float) -> float | None:
        """Return how the spectral norm of an update grows with the shape, per unit of rate; None where unknown."""
        return None

    @property
    def moments(self) -> float:
        """Return how many tensors of the parameter's size the state holds."""
        raise NotImplementedError(f"`{self.title}` does not say what its state holds")

    @property
    def moments_known(self) -> bool:
        """Return whether `moments` holds for every parameter, and is no guess."""
        return True

    @property
    def averages_gradients(self) -> bool | None:
        """Whether a parameter's state has a running mean of its gradients; None where only a step shows it."""
        return None

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it clips only when asked to."""
        return effect != CLIPPING or self.clip is not None

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""

    @abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""

    def update_entries(self, options: Mapping[str, Any], entries: Sequence[Chosen]) -> None:
        """Step chosen entries of weights in place, with torch's `options` and state of them.

        Only where `steps_entries`.
        """
        raise NotImplementedError(f"`{self.title}` has no operator for chosen entries")

    @property
    def steps_entries(self) -> bool:
        """Whether `update_entries` takes the step of entries that a mask has chosen."""
        return False

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

    @property
    def own_betas(self) -> tuple[float, ...]:
        """The decay rates of Adam's moments where no field has them, of an optimizer that corrects their bias."""
        return ()

    def lower(self, to: Lowering) -> None:
        """Claim the selected parameters, with the rate, the decay and other options of each."""
        from trainc.runtime.step.optimizer import Option

        frozen = set()
        if self.freeze is not None:
            frozen = {*to.select(self.freeze, "parameters")}
            to.freeze(frozen)
        trained = {name for name in to.clause.targets if name not in frozen}
        if not trained:
            raise FieldError("freeze", "`freeze` leaves nothing to train: freeze fewer parameters")
        unwritten = Option.fixed(0.0 if self.weight_decay != () else self.own_decay)
        known: OptionValues = {"weight_decay": unwritten}
        if betas := self.own_betas:
            known["betas"] = tuple(map(Option.fixed, betas))
        options: dict[str, OptionValues] = {name: {**known} for name in to.clause.targets}
        for field in ("lr", "weight_decay", *self.scheduled):
            self._refuse_frozen(field, to, trained)
            given = to.schedules_of(field)
            left = [name for name in to.clause.targets if name in trained and name not in given]
            if left and field != "weight_decay":
                raise FieldError(field, _not_reached(field, left))
            for name, value in given.items():
                options[name][field] = value
        claim = to.closure if self.asks else to.optimizer
        rates = [options[name]["lr"] for name in sorted(trained)]
        steady = all(isinstance(rate, Option) and rate.constant is not None for rate in rates)
        claim(self, options, steady=steady, has_modes=self.has_modes)

    def _refuse_frozen(self, field: str, to: Lowering, trained: set[str]) -> None:
        """Raise FieldError for an entry of a field that is for frozen parameters alone."""
        value = getattr(self, field)
        for entry in value if isinstance(value, tuple) else ():
            if entry.on is not None and trained.isdisjoint(to.select(entry.on, "parameters")):
                raise FieldError(
                    field,
                    f"`{entry}` of `{field}` does nothing, because `freeze` selects all of it: remove it",
                )


def _not_reached(field: str, names: list[str]) -> str:
    """Return the message for parameters that no entry of a field is for."""
    named = ", ".join(f"`{name}`" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f'no entry of `{field}` is for {named}{more}: add one, such as `... on "{names[0]}"`'
