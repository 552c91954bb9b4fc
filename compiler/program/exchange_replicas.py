"""The processes that a program exchanges with after its steps, and what makes an exchange impossible."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.runtime.processes.elastic_group import ElasticGroup
from trainc.runtime.processes.replica_group import MEETING, Fact, ReplicaGroup, world_size
from trainc.runtime.processes.sharded import is_sharded, local, sum_over_shards
from trainc.runtime.processes.sharded_replicas import ShardedReplicas, replicas_among
from trainc.runtime.processes.torchft_connection import (
    LIGHTHOUSE,
    NUMBER,
    WAIT,
    Connection,
    find_place,
)
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import failures_of
from trainc.runtime.step.exchange import ElasticExchange
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Step

_TRIES = 3
"""How often a replica tries to meet the others before its first step, since one may be lost meanwhile."""
_OWN = ("execution", "fitting", "fitting_evaluation")
"""What of a program's state is of its own process and hardware: a replica that takes over a state keeps its own."""


class HasState(Protocol):
    """A program, as far as replicas hand its state on."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ExchangeReplicas:
    """All processes of torch.distributed as replicas of one program; `label` is the clause that exchanges.

    A process is a replica, or those are one that parameters are sharded over.
    """

    def __init__(self, execution: Execution, label: str, plan_hash: str) -> None:
        self.execution, self.label, self.plan_hash = execution, label, plan_hash
        self._group: ReplicaGroup | None = None
        self._met = False

    def opened(self, step: Step, machine: StepMachine, notes: list[str]) -> Step:
        """Return the step to run in place of one that was opened: another where the program has another state now."""
        return step

    def join(self) -> ReplicaGroup | None:
        """Return the replicas to exchange with, None for a single one; called in every step, before its forward pass.

        The first call waits for all processes and compares plan, step and, before the first step, the weights. Raises
        ValueError where these differ, and SiteError where gradients are averaged over replicas, too, or where these
        are not sharded alike.
        """
        if world_size() == 1:
            return None
        if not self._met:
            self._group = self._meet()
            self._met = True
        elif (refused := self._refusal()) is not None:
            raise SiteError(refused, self.label)
        return self._group

    def _meet(self) -> ReplicaGroup | None:
        """Return the replicas as all processes tell them, after all of them have said whether they can exchange."""
        refused, group = self._refusal(), ReplicaGroup()
        own = refused or self._shares()
        everyone: list[str | list[int]] = [[]] * group.size
        dist.all_gather_object(everyone, own)
        if (found := next((one for one in everyone if isinstance(one, str)), None)) is not None:
            raise SiteError(refused or found, self.label)
        try:
            replicas = replicas_among([one for one in everyone if isinstance(one, list)])
        except ValueError as error:
            raise SiteError(
                f"`{self.label}` exchanges between replicas that are sharded over as many processes each: {error}."
                ' Give `fully_shard` the rows of one mesh of all processes, `mesh["shard"]`, on every process',
                self.label,
            ) from error
        if len(replicas) == 1:
            return None
        if len(replicas) < group.size:
            group = ShardedReplicas(replicas)
        steps = self.execution.clock.steps
        group.agree(f"after step {steps}" if steps else "from the start", self._facts(steps))
        return group

    def _shares(self) -> list[int] | str:
        """Return the ranks that hold this process's parameters with it, in the order of shards; or what is wrong."""
        found: dict[tuple[int, ...], str] = {}
        for name, parameter in self.execution.parameters.items():
            if is_sharded(parameter):
                placed: Any = parameter
                found.setdefault(tuple(placed.device_mesh.mesh.flatten().tolist()), name)
        if len(found) > 1:
            (one, first), (other, second) = [*found.items()][:2]
            return (
                f"`{first}` is sharded over ranks {[*one]} and `{second}` over ranks {[*other]}, so that they belong to"
                f" no one replica that `{self.label}` could exchange: shard all parameters over the same processes"
            )
        return [*next(iter(found), (dist.get_rank(),))]

    def _refusal(self) -> str | None:
        """Return what is wrong where the model's wrapper or its sharding averages over replicas in every step."""
        execution = self.execution
        if first_shard(execution.parameters) is None:
            if execution.replicas is None:
                return None
            wrapper = type(execution.forward).__name__
            return (
                f"`program.forward` is a wrapper of the model, `{wrapper}`, that averages gradients over processes in"
                f" every step. `{self.label}` lets each process train on its own and exchanges weights instead: leave"
                " `program.forward` as it is, or remove the `distribute` clause"
            )
        for name, parameter in execution.parameters.items():
            placements: Any = getattr(parameter, "placements", ())
            if any(place.is_replicate() for place in placements):
                return (
                    f"`{name}` is sharded by FSDP2 with replicas (HSDP, {placements}), which averages gradients over"
                    f" these in every step. `{self.label}` lets each replica train on its own and exchanges weights"
                    ' instead: give `fully_shard` the row of the mesh alone, `mesh["shard"]`, or remove the'
                    " `distribute` clause"
                )
        return None

    @property
    def _plan(self) -> Fact:
        remedy = "Compile the same spec with the same model on every process"
        return Fact("their plan", f"the plan {self.plan_hash[:12]}", remedy)

    def _facts(self, steps: int) -> list[Fact]:
        facts = [
            Fact(MEETING, "the first step of a program", "Run the same steps on every process"),
            self._plan,
            Fact("the step", f"done {steps} steps", "Resume all from checkpoints of one step"),
        ]
        if not steps:
            remedy = "Build the model with the same seed on every process, or load the same weights"
            facts.append(weights_fact("their starting weights", self.execution.parameters, remedy))
        return facts


class ElasticReplicas(ExchangeReplicas):
    """Replicas of one program that may leave and join, each a process of its own; `action` has their turns."""

    def __init__(
        self, execution: Execution, action: ElasticExchange, plan_hash: str, program: HasState
    ) -> None:
        super().__init__(execution, action.label, plan_hash)
        self.action, self._program = action, program
        self._entered = self._took_over = False

    def opened(self, step: Step, machine: StepMachine, notes: list[str]) -> Step:
        """Meet the others before the first step, and go on with the state of one of them where this one is behind.

        Raises ClauseFailed where no meeting comes about, or this process cannot be a replica of theirs.
        """
        batch = 0 if machine.micro_size else machine.batch_size
        if self._entered or not self._enter(step):
            return step
        notes += step.notes
        machine.batch_size = batch or machine.batch_size
        return machine.begin()

    def _enter(self, step: Step) -> bool:
        """Meet the others; return whether the program has the state of another now."""
        with failures_of(self.label):
            self._refuse_several()
            self.action.alone = (
                "this process trains alone, so nothing is exchanged; start a lighthouse with `torchft_lighthouse"
                f" --min_replicas 1`, and in each process set {LIGHTHOUSE} to its address and {NUMBER} to a number of"
                " its own"
            )
            if (place := find_place()) is not None:
                connection = Connection(*place)
                group = ElasticGroup(connection, place[1], self._give, self._take, [self._plan])
                self._meet_first(step, group)
                self._group = group
        self._entered = True
        return self._took_over

    def join(self) -> ReplicaGroup | None:
        if (refused := self._refusal()) is not None:
            raise SiteError(refused, self.label)
        return self._group

    def _meet_first(self, step: Step, group: ElasticGroup) -> None:
        for _ in range(_TRIES):
            if (why := self.action.meet(step, group, trains=False)) is None:
                return
            if not group.stands:
                break
        group.leave()
        raise ValueError(
            f"no meeting with other replicas came about: {why}. Start a lighthouse with `torchft_lighthouse"
            f" --min_replicas 1` where all can reach it, and set {LIGHTHOUSE} to the address that it shows; where turns"
            f" are further apart than this replica waits, set {WAIT} to more seconds"
        )

    def _refuse_several(self) -> None:
        if (size := world_size()) > 1:
            raise ValueError(
                f"this process is one of {size} of torch.distributed, and with `membership = torchft` every replica is"
                " one process: start each by itself, without `init_process_group`, or remove `membership`"
            )

    def _give(self, clock: Clock) -> dict[str, Any]:
        """Return a copy of the program's state for another replica, at a clock."""
        state = copy.deepcopy(self._program.state_dict())
        return {**state, "clock": clock.state_dict()}

    def _take(self, state: dict[str, Any]) -> None:
        own = self._program.state_dict()
        kept = {key: own[key] for key in _OWN if key in own}
        others = {key: value for key, value in state.items() if key not in _OWN}
        self._program.load_state_dict(others | kept)
        self._took_over = True


def exchange_of(
    execution: Execution, method: LoweredMethod, plan_hash: str, program: HasState
) -> ExchangeReplicas | None:
    """Return what joins a program to those that it exchanges with; None where no clause exchanges."""
    label = next(iter(method.exchanges), None)
    if label is None or label not in method.elastic:
        return None if label is None else ExchangeReplicas(execution, label, plan_hash)
    turns = (one for one in method.actions if isinstance(one, ElasticExchange))
    action = next(one for one in turns if one.label == label)
    return ElasticReplicas(execution, action, plan_hash, program)


def weights_fact(what: str, weights: Mapping[str, Tensor], remedy: str) -> Fact:
    """Return that all replicas have the same weights; those that shard them call this together."""
    tensors = [*weights.values()]
    sums = torch.stack([_checksum(local(one)).to(local(tensors[0]).device) for one in tensors])
    sum_over_shards(sums, tensors)
    pairs = zip(weights, sums.tolist(), strict=True)
    lines = (f"`{name}` with checksum {one & 0xFFFFFFFFFFFFFFFF:x}" for name, one in pairs)
    return Fact(what, "\n".join(lines), remedy)


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers, 0-d: exact in any order of summation."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = plain.contiguous().view(whole[plain.element_size()])
    return bits.sum(dtype=torch.int64)
