"""Two published methods on `to.exchange`, beside the one that is in the catalog: leader SGD and DiLoCo."""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.values.value_json import Duration
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.exchange import Exchange
from trainc.runtime.step.record import Step

STEPS = Effect("exchange", "exchange", ("params",), ("params", "metrics", "signal:bytes"))


def copies(step: Step) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in step.parameters.values()]


class Outer(Exchange):
    """DiLoCo: a step of SGD with Nesterov momentum on the change of the mean since the turn before."""

    def __init__(self, label: str, lr: float, momentum: float) -> None:
        super().__init__(label)
        self.lr, self.momentum = lr, momentum
        self.agreed: list[Tensor] = []
        self.outer: torch.optim.SGD | None = None

    def prepare(self, step: Step) -> None:
        if self.outer is None:
            self.agreed = self.agreed or copies(step)
            self.outer = torch.optim.SGD(
                self.agreed, lr=self.lr, momentum=self.momentum, nesterov=True
            )

    def turn(self, step: Step, replicas: ReplicaGroup) -> None:
        assert self.outer is not None
        means = copies(step)
        replicas.mean_in_place(means)
        for weight, mean in zip(self.agreed, means, strict=True):
            weight.grad = weight - mean
        self.outer.step()
        for parameter, weight in zip(step.parameters.values(), self.agreed, strict=True):
            parameter.detach().copy_(weight)


class Prepare(Action):
    phase = Phase.RATES

    def __init__(self, of: Any) -> None:
        self.name, self.of = f"{of.name} start", of

    def run(self, step: Step) -> None:
        self.of.prepare(step)


class DiLoCo(Construct):
    """DiLoCo."""

    kind: ClassVar = "distribute"
    name: ClassVar = "diloco"
    signals: ClassVar = {"bytes": "bytes sent"}
    effects: ClassVar = (Effect("rates", "keep the start", ("params",)), STEPS)
    lr: float = Field(default=0.7, description="outer rate")
    momentum: float = Field(default=0.9, description="outer momentum")

    def lower(self, to: Lowering) -> None:
        outer = Outer(to.label, self.lr, self.momentum)
        to.action(Prepare(outer))
        to.exchange(outer)


class Leader(Exchange):
    """A pull towards the weights of the replica of the group with the lowest loss so far."""

    def __init__(self, label: str, name: str, size: int, pull: float) -> None:
        super().__init__(label, f"{label} {name}")
        self.size, self.pull = size, pull
        self.part: ReplicaGroup | None = None
        self.losses: list[float] = []
        self.stored: list[Tensor] = []

    def prepare(self, step: Step) -> None:
        self.stored = self.stored or copies(step)

    def turn(self, step: Step, replicas: ReplicaGroup) -> None:
        if self.part is None:
            self.part = replicas.split(self.size)
        scores = self.part.gather_rows([step.loss])[:, 0]
        self.stored = copies(step)
        self.part.copy_from(int(scores.argmin()), self.stored)
        for parameter, leader in zip(step.parameters.values(), self.stored, strict=True):
            parameter.detach().lerp_(leader, self.pull)


class Near(Action):
    """After every step, a pull towards the leaders that were stored last; no communication."""

    phase = Phase.DELTAS

    def __init__(self, label: str, leaders: dict[float, Leader]) -> None:
        self.name, self.leaders = f"{label} near", leaders

    def run(self, step: Step) -> None:
        for pull, leader in self.leaders.items():
            for parameter, stored in zip(step.parameters.values(), leader.stored, strict=True):
                parameter.detach().lerp_(stored, pull)


class LeaderSGD(Construct):
    """Leader SGD: groups of two, a turn of each group every 2 steps, of all every 4, every pull 0.1."""

    kind: ClassVar = "distribute"
    name: ClassVar = "leader"
    signals: ClassVar = {"bytes": "bytes sent"}
    effects: ClassVar = (
        Effect("rates", "keep the start", ("params",)),
        Effect("deltas", "pull to the stored leaders", ("params",), ("params",)),
        STEPS,
    )

    def lower(self, to: Lowering) -> None:
        local, everywhere = Leader(to.label, "local", 2, 0.1), Leader(to.label, "global", 4, 0.1)
        local.gate = to.window(None, None, Duration(2, "steps"))
        everywhere.gate = to.window(None, None, Duration(4, "steps"))
        for leader in (local, everywhere):
            to.action(Prepare(leader))
            to.exchange(leader)
        to.action(Near(to.label, {0.1 / 4: everywhere, 0.1 / 2: local}))
