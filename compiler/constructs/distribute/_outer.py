"""DiLoCo: an optimizer of its own on the mean change of the replicas between two turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from trainc.compiler.constructs.distribute._average import Exchanged, Turn, length, squared_distance
from trainc.dsl.reading.field_types import word_or_call
from trainc.dsl.values.functions import CallOf, Function
from trainc.dsl.values.value_json import Call, Name, Number
from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.exchange import Measured
    from trainc.runtime.step.record import Step

_SGD = Function({"lr": "plain", "momentum": "plain", "nesterov": "switch"}, 1, 1)
EXAMPLE = "sgd(lr = 0.7, momentum = 0.9, nesterov = true)"
RULES = {"outer": Function({"optimizer": CallOf("turn optimizer", {"sgd": _SGD}, EXAMPLE)}, 1, 1)}
Rule = Annotated[str | Call, word_or_call("rule", ("average", "leader"), RULES)]
"""What becomes of the weights in a turn."""


@dataclass(frozen=True)
class OuterSgd:
    """SGD on the change of the agreed weights: `nesterov` looks ahead along the momentum, as torch's does."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    @classmethod
    def of(cls, rule: Call) -> OuterSgd:
        """Return that of `outer(sgd(...))`; raises ValueError for numbers that make no sense."""
        call = next(iter((*rule.args, *dict(rule.kwargs).values())))
        assert isinstance(call, Call)
        given = dict(zip(("lr",), call.args, strict=False)) | dict(call.kwargs)
        lr, momentum = (
            one.value if isinstance(one := given.get(name), Number) else 0.0
            for name in ("lr", "momentum")
        )
        nesterov = given.get("nesterov") == Name("true")
        if lr <= 0:
            raise ValueError(f"`lr` of `{call}` must be above 0: at 0 the weights never change")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` of `{call}` must be 0 or more and below 1")
        if nesterov and not momentum:
            raise ValueError(f"`nesterov` of `{call}` needs a `momentum` above 0, such as 0.9")
        return cls(lr, momentum, nesterov)

    def step(
        self, agreed: Tensor, mean: Tensor, momentum: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next agreed weights and the momentum: delta = agreed - mean is the gradient."""
        delta = agreed - mean
        if not self.momentum:
            return agreed - self.lr * delta, None
        momentum = delta if momentum is None else self.momentum * momentum + delta
        ahead = delta + self.momentum * momentum if self.nesterov else momentum
        return agreed - self.lr * ahead, momentum


class Outer(Turn):
    """Phase 11: an outer step on the change of the mean since the turn before; every replica has what it gives."""

    kept: ClassVar = ("agreed", "momentum")
    wide: ClassVar = True
    agreed: dict[str, Tensor]
    """The weights that all agreed on last."""
    momentum: dict[str, Tensor]

    def __init__(self, label: str, of: Exchanged, sgd: OuterSgd) -> None:
        super().__init__(label, of)
        self.sgd = sgd

    def turn(self, step: Step, replicas: ReplicaGroup) -> Measured:
        weights, means = self.of.weights(step), self.copied(step)
        tensors = [*means.values()]
        distance = length(replicas.mean_and_distances(tensors), tensors)
        deltas, steps = [], []
        for name, mean in means.items():
            new = mean
            if (before := self.agreed.get(name)) is not None:
                new, momentum = self.sgd.step(before, mean, self.momentum.get(name))
                if momentum is not None:
                    self.momentum[name] = momentum
                deltas.append(squared_distance(mean, before))
                steps.append(squared_distance(new, before))
            self.agreed[name] = new
            weights[name].copy_(new)
        self.average_the_rest(step, replicas)
        return self.measured(step, replicas, distance, self._sizes(tensors, deltas, steps))

    def _sizes(
        self, tensors: Sequence[Tensor], deltas: Sequence[Tensor], steps: Sequence[Tensor]
    ) -> dict[str, float]:
        """Return how far the mean is from what was agreed on, and how far the step went; nothing where none was taken.

        Both are given as squared norms of what this process holds of each tensor.
        """
        if not deltas or len(deltas) < len(tensors):
            return {}
        return {
            name: length(squares, tensors)
            for name, squares in (("change", deltas), ("step", steps))
        }


class AgreedStart(Action):
    """Phase 7: keeps the weights that all replicas start from, which are agreed on before the first turn."""

    phase = Phase.REDUCE
    reads_shards: ClassVar = True

    def __init__(self, outer: Outer) -> None:
        self.name, self.outer = f"{outer.label} start", outer

    def is_due(self, step: Step) -> bool:
        """Return whether this is the first step of the run and of the clause, and other processes train, too."""
        opens = self.gate is None or self.gate.span().fires(step.clock)
        return opens and step.clock.steps == 0 and step.exchange_group is not None

    def run(self, step: Step) -> None:
        self.outer.agreed = self.outer.copied(step)
