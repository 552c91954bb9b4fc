"""Local SGD: replicas train on their own and average their weights now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem
from trainc.runtime.step.exchange import Exchange

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.record import Step

Replaced = Literal["average", "local"]
STATE = Effect(
    "exchange",
    "average the optimizer's state over replicas",
    ("optimizer_state",),
    ("optimizer_state",),
)


class Local(Construct):
    """Lets every process train on data of its own and averages the weights of all of them every few steps.

    Start several processes with torch.distributed, compile the same spec in each, give each its own batches, and leave
    `program.forward` as it is: after steps n, 2n, ... of `every n steps` each selected parameter is the mean over all
    processes, w <- (w_1 + ... + w_R) / R, the same bits on each. 16-bit weights are averaged in float32. A step that is
    skipped keeps its turn. One process trains as without the clause and says so in a note.

    Between two turns the replicas differ: each saves and resumes its own checkpoint, and evaluates its own weights.
    Loss, batch, clock, signals and noise scales are those of a replica. A `when` rule or a batch policy must come to
    the same batch on all: let it read the clock. This is checked at every turn, as are the step and the tensors that
    are sent; plan and starting weights are compared before the first step. A replica that stops on its own leaves the
    others waiting until the timeout of the process group, or until its process ends.

    `buffers = average` also averages the saved floating-point buffers, such as the running statistics of batch norm,
    so that all replicas are one model after a turn: means are then those of all data; variances lack what the means of
    the replicas differ by. `optimizer_state = average` averages the optimizer's tensors, such as momentum, but not its
    counters of steps. DistributedDataParallel, FSDP2 and `mask` clauses are refused: averaged gradients, shards and
    entries chosen by each replica do not fit weights that a replica trains on its own.
    """

    cite: ClassVar = (
        "McMahan et al., Communication-Efficient Learning, AISTATS 2017, arXiv:1602.05629; Stich, Local SGD Converges"
        " Fast and Communicates Little, ICLR 2019, arXiv:1805.09767"
    )
    usage: ClassVar = "distribute local every 16 steps { rule = average }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {"bytes": "bytes that this process sent in the last turn"}
    effects: ClassVar = (
        Effect(
            "exchange",
            "average the weights over replicas",
            ("params", "clock"),
            ("params", "metrics", "signal:bytes"),
        ),
        STATE,
    )

    rule: Literal["average"] = Field(
        default="average", description="what becomes of the weights in a turn: their mean"
    )
    optimizer_state: Replaced = Field(
        default="local", description="whether the optimizer's state is averaged or left as it is"
    )
    buffers: Replaced = Field(
        default="average",
        description="whether saved floating-point buffers, such as running statistics, are averaged or left alone",
    )

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it averages the optimizer's state only when asked to."""
        return effect != STATE or self.optimizer_state == "average"

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report frozen parameters: they are the same on all replicas."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = f"`{frozen[0]}` is frozen, so all replicas have the same values of it"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")

    def lower(self, to: Lowering) -> None:
        """Average in turns after the steps at which the clause's gate fires."""
        names = [entry.name for entry in to.parameters()]
        buffers = to.buffers() if self.buffers == "average" else dict
        to.exchange(Average(to.label, names, buffers, self.optimizer_state == "average"))

    def reference(self, replicas: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what a turn makes of the tensors of all replicas, by name: their means."""
        import torch

        return {name: torch.stack([one[name] for one in replicas]).mean(0) for name in replicas[0]}


class Average(Exchange):
    """Phase 11: replace weights, and what else is asked for, by their means over all replicas."""

    def __init__(
        self,
        label: str,
        names: Sequence[str],
        buffers: Callable[[], Mapping[str, Tensor]],
        optimizer_state: bool,
    ) -> None:
        super().__init__(label)
        self.names, self.buffers, self.optimizer_state = tuple(names), buffers, optimizer_state

    def turn(self, step: Step, replicas: ReplicaGroup) -> None:
        import torch

        replicas.mean_in_place([tensor for _, tensor in self._trained(step)])
        # In float64 the mean of equal numbers is that number: constants stay what they are.
        replicas.mean_in_place(list(self.buffers().values()), torch.float64)

    def layout(self, step: Step) -> list[str]:
        """Return name, dtype and shape of every tensor that is averaged."""
        both = (*self._trained(step), *self.buffers().items())
        return [f"`{name}` {tensor.dtype} {list(tensor.shape)}" for name, tensor in both]

    def _trained(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        """Yield the selected parameters that train, and their optimizer state where it is averaged."""
        for name in self.names:
            if not (parameter := step.parameters[name]).requires_grad:
                continue
            yield name, parameter.detach()
            state: Mapping[str, Any] = step.optimizer_state(name) if self.optimizer_state else {}
            for key in sorted(state):
                if _is_averaged(state[key]):
                    yield f"{name}/{key}", state[key]


def _is_averaged(value: Any) -> bool:
    """Say whether a value of the optimizer's state is a tensor of numbers, not a counter."""
    return getattr(value, "ndim", 0) > 0 and bool(value.is_floating_point())
