"""The processes that a program exchanges with after its steps, and what makes an exchange impossible."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.runtime.processes.replica_group import MEETING, Fact, ReplicaGroup, world_size


class ExchangeReplicas:
    """All processes of torch.distributed as replicas of one program; `label` is the clause that exchanges."""

    def __init__(self, execution: Execution, label: str, plan_hash: str) -> None:
        self.execution, self.label, self.plan_hash = execution, label, plan_hash
        self._group: ReplicaGroup | None = None

    def join(self) -> ReplicaGroup | None:
        """Return the processes to exchange with, None for a single one; called in every step, before its forward pass.

        The first call waits for all of them and compares plan, step and, before the first step, the weights. Raises
        ValueError where these differ, and SiteError where gradients are averaged, too, or parameters are sharded.
        """
        if world_size() == 1:
            return None
        self._refuse()
        if self._group is None:
            group, steps = ReplicaGroup(), self.execution.clock.steps
            group.agree(f"after step {steps}" if steps else "from the start", self._facts(steps))
            self._group = group
        return self._group

    def _refuse(self) -> None:
        """Raise SiteError where the model's wrapper or its sharding already joins the processes in every step."""
        execution = self.execution
        if (shard := first_shard(execution.parameters)) is not None:
            raise SiteError(
                f"`{shard}` is sharded over processes (FSDP2), so no process has weights of its own that `{self.label}`"
                " could exchange: do not shard the model, or remove the `distribute` clause"
            )
        if execution.replicas is not None:
            wrapper = type(execution.forward).__name__
            raise SiteError(
                f"`program.forward` is a wrapper of the model, `{wrapper}`, that averages gradients over processes in"
                f" every step. `{self.label}` lets each process train on its own and exchanges weights instead: leave"
                " `program.forward` as it is, or remove the `distribute` clause"
            )

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
    """Return that all replicas have the same weights."""
    lines = (f"`{name}` with checksum {_checksum(one):x}" for name, one in weights.items())
    return Fact(what, "\n".join(lines), remedy)


def _checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits as integers: exact in any order of summation."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = plain.contiguous().view(whole[plain.element_size()])
    return int(bits.sum(dtype=torch.int64)) & 0xFFFFFFFFFFFFFFFF
