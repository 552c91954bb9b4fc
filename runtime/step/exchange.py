"""Exchanges: turns with the other replicas after steps, for methods that let replicas train on their own in between."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from trainc.runtime.processes.elastic_group import ElasticGroup
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


@dataclass(frozen=True, slots=True)
class Measured:
    """What a turn measured, the same on every replica: signals of the clause, and figures of each replica by rank."""

    signals: Mapping[str, float] = field(default_factory=dict)
    by_replica: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


class Exchange(Action):
    """Phase 11: a turn with the other replicas, after a step at which the gate fires.

    The clock counts that step: with `every 8 steps` the turns are after steps 8, 16, 24. A process that trains alone
    has no turn and says so once. All replicas must come to a turn after the same step and with the same `layout`.
    `turn` may use every method of ReplicaGroup; what it sends is measured as `<label>.bytes`, among how many as
    `<label>.replicas`, and what it returns as signals of the clause.
    """

    phase = Phase.EXCHANGE
    figures: tuple[str, ...] = ("turns", "sent", "last", "replicas", "trained_alone")
    alone: str = _ALONE
    """What to say where this process trains alone."""

    def __init__(self, label: str, name: str | None = None) -> None:
        self.label, self.name = label, name or label
        self.turns = self.sent = self.last = self.replicas = 0
        self.trained_alone = False

    @abstractmethod
    def turn(self, step: Step, replicas: ReplicaGroup) -> Measured | None:
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
        measured = self.turn(step, replicas)
        sent = replicas.sent - before
        self.turns, self.last, self.replicas = self.turns + 1, number, replicas.size
        self.sent += sent
        self._record(step, sent, replicas.size, measured)

    def _record(
        self, step: Step, sent: int, replicas: int, measured: Measured | None = None
    ) -> None:
        measured = measured or Measured()
        bytes_sent = step.metrics.get(f"{self.label}.bytes", 0.0) + sent
        own = {"bytes": bytes_sent, "replicas": float(replicas), **measured.signals}
        found = {f"{self.label}.{name}": value for name, value in own.items()}
        step.metrics.update(found)
        step.signals.update(found)
        for name, figures in measured.by_replica.items():
            named = {f"replica {rank}": value for rank, value in figures.items()}
            step.series[f"{self.label}.{name}"] = named

    def _say_alone(self, step: Step) -> None:
        self._record(step, 0, 1)
        if not self.trained_alone:
            alone = self.alone if step.replicas is None else _ONE_REPLICA.format(step.replicas.size)
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
                f" last after step {self.last}"
            )
        alone = ": this process trained alone" if self.trained_alone else ""
        alone = ": all processes were one replica" if alone and self.replicas else alone
        return f"{self.name}: no exchange{alone}"

    def summary_after(self, steps: int) -> str | None:
        """Return the line of the summary, which names the steps since the last turn, if there were any."""
        told, first = self.summary(), self.last + 1
        if told is None or not self.turns or steps < first:
            return told
        if steps == first:
            return f"{told}; step {first} was each replica's own"
        return f"{told}; steps {first} to {steps} were each replica's own"


class ElasticExchange(Exchange):
    """An exchange whose replicas may also leave and join: a turn that fails leaves all as it was, and training goes on.

    One that is behind the others takes over the state of one that is not, and its weights do not count in that turn:
    before its first step, where it waits for their next turn, or in a turn of its own.
    """

    figures: tuple[str, ...] = (*Exchange.figures, "failed")

    def __init__(self, label: str, name: str | None = None) -> None:
        super().__init__(label, name)
        self.failed = 0

    @abstractmethod
    def keep(self, step: Step) -> Callable[[], None]:
        """Return what puts back all that a turn changes."""

    def run(self, step: Step) -> None:
        from trainc.runtime.processes.elastic_group import ElasticGroup

        if isinstance(step.exchange_group, ElasticGroup):
            self.meet(step, step.exchange_group, trains=True)
        else:
            super().run(step)

    def meet(self, step: Step, group: ElasticGroup, *, trains: bool) -> str | None:
        """Meet the replicas that are there, and take part in a turn; return why it failed, None where it did not.

        One that does not come from a step has no turn unless another one does. Raises ValueError where this replica
        cannot be one of them.
        """
        from trainc.runtime.processes.elastic_group import Standing
        from trainc.runtime.processes.replica_group import ReplicaLost

        done = step.clock_after() if trains else step.clock
        own = Standing(self.turns, done.steps, trains, step.batch_size if step.micro_size else 0)
        before, in_turn, why = group.sent, False, None
        measured: Measured | None = None
        put_back: Callable[[], None] | None = None
        try:
            if (received := group.meet(own, done)) is not None:
                self._take_over(step, group, received, trains=trains)
            in_turn = group.compare(own, self._facts(step, 0)[-1:])
            if in_turn:
                put_back = self.keep(step)
                measured = self.turn(step, group)
        except ReplicaLost as error:
            why = str(error)
        except ValueError:
            group.leave()  # so that the others need not wait for this one
            raise
        lost = group.commit()
        why = why or lost
        number, sent = step.clock.steps + trains, group.sent - before
        if why is not None and put_back is not None:
            put_back()
        self._tell(step, group, number, why, in_turn=in_turn)
        self.sent += sent
        if in_turn or trains:
            self._record(step, sent, 0 if why else group.size, None if why else measured)
        return why

    def _take_over(
        self, step: Step, group: ElasticGroup, received: dict[str, Any], *, trains: bool
    ) -> None:
        """Go on from the state of another replica."""
        samples, tokens, sent, failed = step.samples, step.tokens, self.sent, self.failed
        group.take(received)
        self.sent, self.failed = sent, failed
        steps = step.clock.steps
        behind = (
            "this replica was behind the others, and goes on with the state of one that has done"
        )
        begins = "this replica begins with the weights of another"
        step.notes.append(f"{self.name}: {f'{behind} {steps} steps' if steps else begins}")
        if trains:  # the step is open, and is counted when it ends
            step.samples, step.tokens = samples, tokens
            step.clock.before_step(samples, tokens)

    def _tell(
        self, step: Step, group: ElasticGroup, number: int, why: str | None, *, in_turn: bool
    ) -> None:
        """Count a meeting, and say what others should know of it."""
        if why is not None:
            self.failed += 1
            step.notes.append(
                f"{self.name}: the meeting after step {number} failed, and this replica goes on as it was: {why}"
            )
        elif in_turn:
            if group.size != self.replicas and (self.replicas or group.size == 1):
                now = "this replica alone" if group.size == 1 else f"{group.size} replicas"
                then = f", and {self.replicas} before" if self.replicas else ""
                step.notes.append(f"{self.name}: {now} in the turn after step {number}{then}")
            self.turns, self.last, self.replicas = self.turns + 1, number, group.size

    def summary(self) -> str | None:
        told = super().summary()
        if not self.failed:
            return told
        return f"{told}; {self.failed} meeting{'s' * (self.failed > 1)} failed and changed nothing"
