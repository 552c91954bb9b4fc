"""Replicas that are sharded over several processes each, which exchange shard by shard."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from trainc.runtime.processes.replica_group import Fact, ReplicaGroup


class ShardedReplicas(ReplicaGroup):
    """Replicas of several processes each; `size` and `rank` are of replicas.

    `replicas` has the ranks of each, in the order of their shards. What a process exchanges goes to those at its own
    place in the other replicas, which hold the same part of each tensor: nothing is gathered. All processes make this
    together.
    """

    def __init__(self, replicas: Sequence[Sequence[int]]) -> None:
        self.replicas = [tuple(one) for one in replicas]
        own = dist.get_rank()
        number = next(i for i, ranks in enumerate(self.replicas) if own in ranks)
        self.place = self.replicas[number].index(own)
        super().__init__(self._across([*range(len(self.replicas))]))
        self.everyone = ReplicaGroup()
        self.everyone._traffic = self._traffic

    @property
    def process(self) -> int:
        return self.rank * len(self.replicas[0]) + self.place

    def agree(self, when: str, facts: Sequence[Fact]) -> None:
        self.everyone.agree(when, facts)

    def mean_of_processes(
        self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> None:
        self.everyone.mean_in_place(tensors, dtype)

    def split_by_machine(self) -> ReplicaGroup:
        names: list[str] = [""] * self.everyone.size
        dist.all_gather_object(names, socket.gethostname())
        machines = [sorted({names[rank] for rank in ranks}) for ranks in self.replicas]
        return self._part([machines.index(one) for one in machines])

    def _part(self, part_of: Sequence[int]) -> ReplicaGroup:
        parts = {
            part: self._across([i for i, of in enumerate(part_of) if of == part])
            for part in sorted(set(part_of))
        }
        own = ReplicaGroup(parts[part_of[self.rank]])
        own._traffic = self._traffic
        return own

    def _across(self, numbers: Sequence[int]) -> dist.ProcessGroup | None:
        """Return the group of this process's place in replicas; all processes make those of all places, in order."""
        places = range(len(self.replicas[0]))
        groups: list[dist.ProcessGroup | None] = [
            dist.new_group([self.replicas[i][place] for i in numbers]) for place in places
        ]
        return groups[self.place]


def replicas_among(shares: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the ranks of each replica, from those that each rank shards its parameters over, itself included.

    Raises ValueError unless they are a division of all ranks into parts of one size, in the same order in each.
    """
    for rank, ranks in enumerate(shares):
        odd = next((other for other in ranks if shares[other] != ranks), None)
        if odd is not None:
            raise ValueError(
                f"rank {rank} shards its parameters over {_words(ranks)}, and rank {odd}, which is one of these, over"
                f" {_words(shares[odd])}"
            )
    found = [*dict.fromkeys(tuple(ranks) for ranks in shares)]
    if other := [one for one in found if len(one) != len(found[0])]:
        raise ValueError(
            f"the parameters of one replica are sharded over {_words(found[0])}, and those of another over"
            f" {_words(other[0])}: all need the same number of processes"
        )
    for first, second in pairwise(found):
        if any(a > b for a, b in zip(first, second, strict=True)):
            raise ValueError(
                f"one replica is {_words(first)} and the next {_words(second)}, in the order of their shards, so that"
                " the ranks that hold equal shards do not follow each other as the replicas do: let them be the rows of"
                " one mesh whose columns ascend"
            )
    return found


def _words(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} alone" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
