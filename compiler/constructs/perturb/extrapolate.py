"""Extrapolation: the gradient from a point ahead, along a past gradient, the momentum or noise, at no further pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.perturb._base import (
    UNDO,
    MovedWeights,
    WeightPerturbation,
    norm_of,
    refuse_without_momentum,
    running_means,
    sizes_of,
)
from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Effect, Schedule
from trainc.dsl.values.value_json import Number
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.around import Gradients

if TYPE_CHECKING:
    from collections.abc import Container

    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.update_mask import TrainedEntries
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step


class Extrapolate(WeightPerturbation):
    """Updates the weights w with the gradient at w - look_ahead b - rate d, from the step's own passes alone.

    d is the `direction`. `past_gradient`: the gradient that the last step's passes found, before
    replicas average it: each process extrapolates by its own, and all update with the mean. With
    `scope = all` it is that mean. `momentum`: b, the momentum buffer of SGD or the first moment of
    Adam, as the last update left it. `noise`: standard normal numbers, drawn once a step, other ones
    on each process, or with `scope = all` the same; `rate` is then their standard deviation. With
    `radius` in place of `rate` the step is -radius d / |d|, with one L2 norm over all selected
    parameters. b is looked ahead along as well, where `look_ahead` is given: `0.9 * lr` goes where
    SGD with momentum 0.9 is about to go.

    In the first step there is no past gradient and no momentum, and nothing moves. A gradient that
    is not finite is not kept. The past gradient is that of the clause's last open step, over all
    micro-batches, unclipped, and takes the memory of the weights; a checkpoint has it, but for own
    ones of several processes: after one of these the first step moves nothing. Clipping, masks and
    what is measured see the gradient at the moved weights, and the loss reported is that there. w
    comes back bit for bit before the update.

    The form is trainc's own, after the idea of the paper: it is not held to published numbers.
    """

    cite: ClassVar = (
        "after Lin, Kong, Stich, Jaggi, Extrapolation for Large-batch Training in Deep Learning, "
        "ICML 2020, arXiv:2006.05720"
    )
    usage: ClassVar = "perturb extrapolate { direction = past_gradient, rate = 0.01 }"
    identity: ClassVar = {"rate": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "move the weights ahead",
            ("params", "optimizer_state", "clock"),
            ("params",),
        ),
        UNDO,
    )

    direction: Literal["past_gradient", "momentum", "noise"] = Field(
        description="what the weights are moved along"
    )
    rate: Schedule | None = Field(
        default=None, description="factor of the direction; of `noise`, its standard deviation"
    )
    radius: Schedule | None = Field(
        default=None, description="length of the step, in place of `rate`"
    )
    look_ahead: Schedule = Field(
        default=Number(0), description="factor of the momentum b, by which the weights move as well"
    )
    scope: Literal["local", "all"] = Field(
        default="local",
        description="of several processes: each with its own past gradient or noise, or all with one",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.rate is None) == (self.radius is None):
            raise ValueError("write `rate` or `radius`, one of the two: how far the weights move")
        if self.scope == "all" and self.direction == "momentum":
            raise ValueError(
                "`scope` is of past gradients and noise: all processes have one momentum"
            )
        return self

    def identity_setting(self, changing: Container[str] = ()) -> str | None:
        """Return `rate = 0`, where nothing else moves the weights."""
        ahead = "look_ahead" in changing or self.look_ahead != Number(0)
        return None if ahead else super().identity_setting(changing)

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step; raises FieldError where no process has a gradient of its own."""
        if self.direction == "momentum" or self.look_ahead != Number(0):
            refuse_without_momentum(to)
        if self.direction == "past_gradient" and self.scope == "local":
            for name in sizes_of(to):
                if to.is_sharded(name):
                    raise FieldError(
                        "scope",
                        f"`{name}` is sharded over processes (FSDP2), which average its gradient inside the backward"
                        " pass, so no process has its own: write `scope = all`, or use DistributedDataParallel",
                    )
        length = self.rate if self.radius is None else self.radius
        assert length is not None
        schedules = to.schedule(length), to.schedule(self.look_ahead)
        to.around(Ahead(to.label, self, *schedules, sizes_of(to), to.trained_entries()))

    def reference(
        self,
        direction: Mapping[str, Tensor],
        length: float,
        momentum: Mapping[str, Tensor] | None = None,
        look_ahead: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return what is added to each weight, by definition; `length` is `rate` or `radius`."""
        factor = length if self.radius is None else length / (norm_of(direction.values()) + 1e-12)
        moves = {name: d * -factor for name, d in direction.items()}
        for name, b in (momentum or {}).items():
            moves[name] = moves[name] - look_ahead * b if name in moves else b * -look_ahead
        return moves


class Ahead(MovedWeights):
    """Runs the passes of a step ahead of the weights, and keeps the gradient that they find."""

    what: ClassVar = "the direction"

    def __init__(
        self,
        name: str,
        method: Extrapolate,
        length: Callable[[Clock], float],
        look_ahead: Callable[[Clock], float],
        sizes: Mapping[str, int],
        entries: TrainedEntries,
    ) -> None:
        super().__init__(name, length, sizes)
        self.method, self.look_ahead, self.entries = method, look_ahead, entries
        self.past: dict[str, Tensor] = {}
        self.differs = False
        """Whether other processes keep other gradients."""
        self._momentum: dict[str, Tensor] | None = None
        self._ahead = 0.0

    def is_wanted(self, step: Step, length: float) -> bool:
        """Return whether there is something to move along."""
        self._ahead = self.look_ahead(step.clock)
        known = self.method.direction != "past_gradient" or bool(self.past)
        return known and bool(length or self._ahead)

    def directions(self, step: Step, gradients: Gradients) -> Mapping[str, Tensor] | None:
        """Return d; None where there is none yet."""
        along = self.method.direction == "momentum"
        if self._ahead or along:
            self._momentum = running_means(self.name, step, self.sizes, self.entries)
        if along:
            return self._momentum
        if self.method.direction == "noise":
            return self._noise(step, gradients)
        from trainc.runtime.processes.sharded import shard_like

        past = {n: shard_like(g, step.parameters[n].detach()) for n, g in self.past.items()}
        return {name: self.entries.trained(name, g) for name, g in past.items()}

    def _noise(self, step: Step, gradients: Gradients) -> dict[str, Tensor]:
        import torch

        from trainc.runtime.processes.sharded import is_sharded, local

        made, found = {}, {}
        for name in self.sizes:
            weight = step.parameters[name].detach()
            own, place = self.method.scope == "local" or is_sharded(weight), weight.device
            if (own, place) not in made:
                made[own, place] = gradients.draw(self.name, place, own=own)
            noise = torch.empty_like(weight)
            local(noise).normal_(generator=made[own, place])
            found[name] = self.entries.trained(name, noise)
        return found

    def moves(
        self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor], length: float, norm: float
    ) -> dict[str, Tensor]:
        """Return what the definition says."""
        moves = self.method.reference(found, length, self._momentum, self._ahead)
        return {name: move for name, move in moves.items() if name in weights}

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Hold the weights ahead; keep the gradient of the passes inside."""
        averaged = self.method.scope == "all"
        keeps = self.method.direction == "past_gradient"
        found = gradients.watch(averaged=averaged) if keeps else None
        with super().surround(step, gradients):
            yield
        self._momentum = None
        if found is not None:
            past = {name: g for name, g in found().items() if name in self.sizes}
            finite = bool(past) and norm_of(past.values()) < float("inf")
            self.past = past if finite else {}
            self.differs = step.replicas is not None and not averaged

    def state_dict(self) -> ActionState:
        """Return the past gradient, where all processes have the same."""
        return {} if self.differs else {name: g.clone() for name, g in self.past.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the past gradient."""
        self.past = {name: g.clone() for name, g in state.items()}

    def memory(self) -> int:
        """Return the bytes of the copies of the weights, and of the past gradient."""
        return super().memory() * (2 if self.method.direction == "past_gradient" else 1)
