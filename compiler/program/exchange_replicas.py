"""The processes that a program exchanges with after its steps, and what makes an exchange impossible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.runtime.processes.replica_group import MEETING, Fact, ReplicaGroup, world_size
from trainc.runtime.processes.sharded import is_sharded, local, sum_over_shards
from trainc.runtime.processes.sharded_replicas import ShardedReplicas, replicas_among


class ExchangeReplicas:
    """All processes of torch.distributed as replicas of one program; `label` is the clause that exchanges.

    A process is a replica, or those are one that parameters are sharded over.
    """

    def __init__(self, execution: Execution, label: str, plan_hash: str) -> None:
        self.execution, self.label, self.plan_hash = execution, label, plan_hash
        self._group: ReplicaGroup | None = None
        self._met = False

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

    def _facts(self, steps: int) -> list[Fact]:
        facts = [
            Fact(MEETING, "the first step of a program", "Run the same steps on every process"),
            Fact(
                "their plan",
                f"the plan {self.plan_hash[:12]}",
                "Compile the same spec with the same model on every process",
            ),
            Fact("the step", f"done {steps} steps", "Resume all from checkpoints of one step"),
        ]
        if not steps:
            remedy = "Build the model with the same seed on every process, or load the same weights"
            facts.append(weights_fact("their starting weights", self.execution.parameters, remedy))
        return facts


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
