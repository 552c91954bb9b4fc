"""What turns of all rules share, and the one in which replicas come to means of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.runtime.step.action import ActionState
from trainc.runtime.step.exchange import ElasticExchange, Measured
from trainc.runtime.storage.form import Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.record import Step


@dataclass(frozen=True)
class Exchanged:
    """What a turn is about: the selected parameters by name, the model's buffers, and if the optimizer's state is.

    `buffers` returns those that become means, none where each process keeps its own.
    """

    parameters: Mapping[str, Tensor]
    buffers: Callable[[], Mapping[str, Tensor]]
    optimizer_state: bool

    def weights(self, step: Step) -> dict[str, Tensor]:
        """Return the selected parameters that train."""
        found = ((name, step.parameters[name]) for name in self.parameters)
        return {name: p.detach() for name, p in found if p.requires_grad}

    def states(self, step: Step) -> dict[str, Tensor]:
        """Return the optimizer's tensors of these where they are exchanged, by parameter and key."""
        return dict(self._states(step)) if self.optimizer_state else {}

    def _states(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        for name in self.weights(step):
            state = step.optimizer_state(name)
            for key in sorted(state):
                if _is_averaged(state[key]):
                    yield f"{name}/{key}", state[key]


class Turn(ElasticExchange):
    """Phase 11: a turn that is about weights; subclasses say in `kept` which attributes hold some from turn to turn.

    Each is a dict of tensors by the names of parameters, of their shapes, and float32 at least where it is in `wide`.
    """

    reads_shards: ClassVar = True
    kept: ClassVar[tuple[str, ...]] = ()
    wide: ClassVar[bool] = False

    def __init__(self, label: str, of: Exchanged) -> None:
        super().__init__(label)
        self.of = of
        for what in self.kept:
            setattr(self, what, {})

    def measured(
        self,
        step: Step,
        replicas: ReplicaGroup,
        distance: float,
        signals: Mapping[str, float] | None = None,
    ) -> Measured:
        """Return loss and distance of all replicas in this turn, from those of this one, beside other signals.

        A distance that is NaN is none: that of a leader from itself.
        """
        rows = replicas.rows_in_turn([step.loss, distance]).tolist()
        found = dict(signals or {})
        for name, column in zip(("loss", "distance"), zip(*rows, strict=True), strict=True):
            if known := [value for value in column if not math.isnan(value)]:
                found |= {name: math.fsum(known) / len(known)}
                found |= {f"{name}_low": min(known), f"{name}_high": max(known)}
        numbers = replicas.numbers_in_turn()
        losses = {number: row[0] for number, row in zip(numbers, rows, strict=True)}
        return Measured(found, {"loss": losses})

    def average_the_rest(self, step: Step, replicas: ReplicaGroup) -> None:
        """Average the optimizer's state and the buffers where this is asked for."""
        import torch

        replicas.mean_in_place([*self.of.states(step).values()])
        # In float64 the mean of equal numbers is that number: constants stay what they are.
        # Where a replica is sharded, each of its processes has buffers of its own.
        replicas.mean_of_processes([*self.of.buffers().values()], torch.float64)

    def keep(self, step: Step) -> Callable[[], None]:
        changed = [*self._exchanged(step).values()]
        before = [tensor.clone() for tensor in changed]
        kept = {what: dict(getattr(self, what)) for what in self.kept}

        def put_back() -> None:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            for what, tensors in kept.items():
                setattr(self, what, tensors)

        return put_back

    def layout(self, step: Step) -> list[str]:
        """Return name, dtype and shape of every tensor that is exchanged, and along which axis it is sharded."""
        every = self._exchanged(step)
        return [
            f"`{name}` {tensor.dtype} {list(tensor.shape)}" + _placed(tensor)
            for name, tensor in every.items()
        ]

    def _exchanged(self, step: Step) -> dict[str, Tensor]:
        return self.of.weights(step) | self.of.states(step) | dict(self.of.buffers())

    def copied(self, step: Step) -> dict[str, Tensor]:
        """Return copies of the weights as this action keeps them."""
        return {name: self._kept_form(w) for name, w in self.of.weights(step).items()}

    def memory(self) -> int:
        from trainc.runtime.processes.sharded import local

        return sum(local(tensor).nbytes for tensor in self._by_key().values())

    def state_dict(self) -> ActionState:
        return self._by_key()

    def state_form(self) -> Form:
        """Return that each kept tensor is like its parameter; before the first turn there may be none."""
        like = {
            name: Values.like(p, True, self._dtype(p)) for name, p in self.of.parameters.items()
        }
        return Record(
            optional={f"{what}/{name}": form for what in self.kept for name, form in like.items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what was kept; without it the rule begins as in a run that has had no turn."""
        for what in self.kept:
            setattr(self, what, {})
        for key, tensor in state.items():
            what, _, name = key.partition("/")
            if what not in self.kept or name not in self.of.parameters:
                raise ValueError(
                    f"the checkpoint has `{key}`, which another rule or selection of this clause kept"
                )
            own = self.of.parameters[name]
            getattr(self, what)[name] = tensor.to(own.device, self._dtype(own), copy=True)

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        """Load what is of parameters that this rule keeps, too."""
        known = {k: v for k, v in state.items() if self._fits(k, v)}
        self.load_state_dict(known)
        dropped = len(state) - len(known)
        return (
            f"{self.name}: {dropped} tensors that another rule or selection kept are dropped"
            if dropped
            else None
        )

    def _fits(self, key: str, value: Any) -> bool:
        what, _, name = key.partition("/")
        own = self.of.parameters.get(name)
        return what in self.kept and own is not None and own.shape == value.shape

    def _by_key(self) -> dict[str, Tensor]:
        return {f"{what}/{n}": t for what in self.kept for n, t in getattr(self, what).items()}

    def _kept_form(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._dtype(tensor), copy=True)

    def _dtype(self, tensor: Tensor) -> Any:
        import torch

        return torch.promote_types(tensor.dtype, torch.float32) if self.wide else tensor.dtype


class Average(Turn):
    """Phase 11: replace weights, and what else is asked for, by their means over all replicas."""

    def turn(self, step: Step, replicas: ReplicaGroup) -> Measured:
        weights = [*self.of.weights(step).values()]
        distance = length(replicas.mean_and_distances(weights), weights)
        self.average_the_rest(step, replicas)
        return self.measured(step, replicas, distance)


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return |one - other|^2 of what this process holds, (), in float64."""
    import torch

    from trainc.runtime.processes.sharded import local, squared_norm

    a, b = local(one), local(other)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return squared_norm(a.to(wide) - b.to(wide))


def length(squares: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """Return the L2 norm of all of some tensors, from the squared norms of what this process holds of each."""
    from trainc.runtime.processes.sharded import stacked, sum_over_shards

    sum_over_shards(found := stacked(squares), tensors)
    return math.sqrt(float(found.sum()))


def _placed(tensor: Tensor) -> str:
    """Return how a DTensor is sharded, in words; nothing of another tensor."""
    places = getattr(tensor, "placements", ())
    return f" sharded as {', '.join(map(str, places))}" if places else ""


def _is_averaged(value: Any) -> bool:
    """Say whether a value of the optimizer's state is a tensor of numbers, not a counter."""
    return getattr(value, "ndim", 0) > 0 and bool(value.is_floating_point())
