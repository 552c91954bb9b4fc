"""Exchanges: turns with the other replicas after steps, for methods that let replicas train on their own in between."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from trainc.runtime.processes.replica_group import Fact, ReplicaGroup
    from trainc.runtime.step.record import Step


_ALONE = (
    "this process trains alone, so nothing is exchanged; start several, for example with"
    " `torchrun --nproc-per-node 4`, and call `torch.distributed.init_process_group()` in each"
)
_ONE_REPLICA = (
    "the parameters are sharded over all {} processes, which makes them one replica, so nothing is exchanged; for"
    " several give `fully_shard` the rows of a mesh, such as"
    ' `init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))["shard"]`'
)


class Exchange(Action):
    """Phase 11: a turn with the other replicas, after a step at which the gate fires.

    The clock counts that step: with `every 8 steps` the turns are after steps 8, 16, 24. A process that trains alone
    has no turn and says so once. All replicas must come to a turn after the same step and with the same `layout`.
    `turn` may use every method of ReplicaGroup; what it sends is measured as `<label>.bytes`.
    """

    phase = Phase.EXCHANGE
    figures: tuple[str, ...] = ("turns", "sent", "last", "replicas", "trained_alone")

    def __init__(self, label: str, name: str | None = None) -> None:
        self.label, self.name = label, name or label
        self.turns = self.sent = self.last = self.replicas = 0
        self.trained_alone = False

    @abstractmethod
    def turn(self, step: Step, replicas: ReplicaGroup) -> None:
        """Exchange with the other replicas and change what is to be changed, the same way in each."""

    def layout(self, step: Step) -> Sequence[str]:
        """Return a line for each thing that this turn sends; the lines must be the same on every replica."""
        return ()

    def is_due(self, step: Step) -> bool:
        return self.gate is None or self.gate.fires(step.clock_after())

    def run(self, step: Step) -> None:
        replicas, number = step.exchange_group, step.clock.steps + 1
        if replicas is None:
            self._say_alone(step)
            return
        before = replicas.sent
        replicas.agree(f"after step {number}", self._facts(step, number))
        self.turn(step, replicas)
        sent = replicas.sent - before
        self.turns, self.last, self.replicas = self.turns + 1, number, replicas.size
        self.sent += sent
        self._record(step, sent)

    def _record(self, step: Step, sent: int) -> None:
        name = f"{self.label}.bytes"
        step.metrics[name] = step.metrics.get(name, 0.0) + sent
        step.signals[name] = step.metrics[name]

    def _say_alone(self, step: Step) -> None:
        self._record(step, 0)
        if not self.trained_alone:
            alone = _ALONE if step.replicas is None else _ONE_REPLICA.format(step.replicas.size)
            step.notes.append(f"{self.name}: {alone}")
        self.trained_alone, self.replicas = True, int(step.replicas is not None)

    def _facts(self, step: Step, number: int) -> list[Fact]:
        from trainc.runtime.processes.replica_group import MEETING, Fact

        # Without `data` in the spec each replica brings batches of its own size.
        batch = f"{step.batch_size} samples" if step.micro_size else "any"
        return [
            Fact(MEETING, f"the turn of `{self.name}`", "Run the same steps on every process"),
            Fact(
                "the step",
                f"step {number}",
                "Run the same number of steps on every process, and resume all of them from checkpoints of one step",
            ),
            Fact(
                "the size of the batch",
                batch,
                "A rule or a policy decides by what its own replica measured: let it read the clock, or remove it",
            ),
            Fact(
                "what is sent",
                "\n".join(self.layout(step)),
                "Compile the same spec with the same model on every process, and freeze the same parameters",
            ),
        ]

    def summary(self) -> str | None:
        if self.turns:
            times = f"{self.turns} exchange{'s' * (self.turns > 1)}"
            return (
                f"{self.name}: {times} between {self.replicas} replicas, {self.sent} bytes sent by this process, the"
                f" last after step {self.last}; since then the replicas differ"
            )
        alone = ": this process trained alone" if self.trained_alone else ""
        alone = ": all processes were one replica" if alone and self.replicas else alone
        return f"{self.name}: no exchange{alone}"
