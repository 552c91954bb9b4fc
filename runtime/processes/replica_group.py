"""The processes of a group as replicas of one program: sums, means, copies and checks over all of them.

What is sent is counted in `sent`: the bytes that this process gives to a collective operation, whatever the network
makes of them. All processes of the group must call a method alike.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainc.runtime.processes.sharded import local, squared_norm

BUCKET = 2**25
"""Bytes that are joined into one message, so that many small tensors cost few messages."""


_AVAILABLE = dist.is_available()
"""Whether torch was built with torch.distributed."""


def world_size() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if _AVAILABLE and dist.is_initialized() else 1


MEETING = "where they are"
"""What the first fact is about: which exchange a replica has come to."""


class Fact(NamedTuple):
    """What all replicas must agree on: `value` may have several lines; `remedy` says what to do if they differ."""

    what: str
    value: str
    remedy: str


class ReplicaLost(RuntimeError):
    """Another replica has ended, or did not come to an exchange in time."""


@dataclass(slots=True)
class Traffic:
    """The bytes that this process has sent, shared by a group and its parts."""

    sent: int = 0


class ReplicaGroup:
    """The processes of a group (None: all); ranks are counted within the group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._traffic = Traffic()

    @property
    def process(self) -> int:
        """The number of this process among those of all replicas."""
        return self.rank

    @property
    def sent(self) -> int:
        """The bytes that this process has sent so far, in this group and in the parts of it."""
        return self._traffic.sent

    def total(self, number: float) -> float:
        """Return the sum of a number over all replicas."""
        found = torch.tensor([number], dtype=torch.float64)
        self.sum_in_place([found])
        return float(found)

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all replicas."""
        for tensor in tensors:
            sent = tensor.to(self._device(tensor))
            self._all_reduce(sent)
            if sent is not tensor:
                tensor.copy_(sent)

    @torch.no_grad()
    def mean_in_place(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        """Replace each tensor by its mean over all replicas, the same bits on each.

        Sums are taken in `dtype`, by default that of the tensor but float32 for 16 bits. Of a DTensor it is what each
        process holds.
        """
        for tensor, mean in self._means(tensors, dtype):
            tensor.copy_(mean)

    @torch.no_grad()
    def mean_and_distances(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Do so; return the squared L2 distance of each tensor from its mean before, (), in float64.

        Of a DTensor it is that of what this process holds.
        """
        squares = []
        for tensor, mean in self._means(tensors, None):
            own = mean.to(tensor.device)
            squares.append(squared_norm(tensor.to(own.dtype) - own))
            tensor.copy_(own)
        return squares

    def mean_of_processes(
        self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """Do so over all processes, also where a replica has several."""
        self.mean_in_place(tensors, dtype)

    @torch.no_grad()
    def copy_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the replica with rank `source`; of a DTensor, what this process holds."""
        for tensor in filter(Tensor.numel, map(local, tensors)):
            sent = tensor.detach().to(self._device(tensor)).contiguous()
            dist.broadcast(sent, group=self.group, group_src=source)
            if self.rank == source:
                self._count(sent)
            else:
                tensor.copy_(sent)

    def gather_rows(self, numbers: Sequence[float]) -> Tensor:
        """Return the numbers of all replicas, shape (replicas, numbers), float64, the same on each."""
        return torch.stack(self._gather(torch.tensor(numbers, dtype=torch.float64)))

    def rows_in_turn(self, numbers: Sequence[float]) -> Tensor:
        """Return the numbers of the replicas whose weights count in a turn, (replicas, numbers), the same on each."""
        return self.gather_rows(numbers)

    def numbers_in_turn(self) -> list[int]:
        """Return the numbers of these replicas, in the order of their rows."""
        return [*range(self.size)]

    def gather_examples(self, own: Tensor) -> Tensor:
        """Return the rows (n, numbers) of all replicas, rank by rank, the same on each; n may differ, and be 0."""
        shapes = self.gather_rows(own.shape)
        most, numbers = (int(one) for one in shapes.max(0).values)
        padded = own.new_zeros(most, numbers)
        padded[: own.shape[0], : own.shape[1]] = own
        counts = shapes[:, 0].int().tolist()
        return torch.cat([r[:n] for r, n in zip(self._gather(padded), counts, strict=True)])

    def split(self, size: int) -> ReplicaGroup:
        """Return this process's part of the group, `size` neighbouring ranks; ValueError if `size` does not divide.

        Make it once and keep it. All processes make all parts, in the same order, as torch.distributed demands.
        """
        if size < 1 or self.size % size:
            raise ValueError(f"{self.size} replicas cannot be divided into groups of {size}")
        return self._part([rank // size for rank in range(self.size)])

    def split_by_machine(self) -> ReplicaGroup:
        """Return this process's part of the group: those that run on machines of the same name, of any number.

        Make it once and keep it.
        """
        names: list[str] = [""] * self.size
        dist.all_gather_object(names, socket.gethostname(), group=self.group)
        return self._part([names.index(name) for name in names])

    def ranks_in(self, whole: ReplicaGroup) -> list[int]:
        """Return the ranks that the processes of this group have in a larger one, in order."""
        every = dist.get_process_group_ranks(whole.group)
        return [every.index(rank) for rank in dist.get_process_group_ranks(self.group)]

    def agree(self, when: str, facts: Sequence[Fact]) -> None:
        """Check that all replicas have the same facts; `when` is a moment of the run, such as `after step 8`.

        Where the first fact is the same, so is the number of facts.

        Raises ValueError on every replica where they differ, ReplicaLost if one of them has ended.
        """
        text = "\n".join(f"{fact.what}\n{fact.value}" for fact in facts)
        digest = hashlib.sha256(text.encode()).digest()[:8]
        own = torch.tensor([int.from_bytes(digest, "big", signed=True)])
        try:
            digests = self._gather(own)
        except RuntimeError as error:
            raise ReplicaLost(
                f"rank {self.rank} waited for the other replicas {when}, but one of them has ended or did not come"
                f" within the timeout of the process group: {str(error).splitlines()[0]}"
            ) from error
        if len({int(digest) for digest in digests}) > 1:
            self._raise_disagreement(when, facts)

    # inside

    def _means(
        self, tensors: Sequence[Tensor], dtype: torch.dtype | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what this process holds of each tensor, and its mean over all replicas, of the same shape."""
        for bucket in _buckets([*map(local, tensors)]):
            wide = dtype or torch.promote_types(bucket[0].dtype, torch.float32)
            flat = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in bucket])
            sent = flat.to(self._device(flat))
            self._all_reduce(sent)
            parts = sent.div_(self.size).split([tensor.numel() for tensor in bucket])
            for tensor, mean in zip(bucket, parts, strict=True):
                yield tensor, mean.view(tensor.shape)

    def _part(self, part_of: Sequence[int]) -> ReplicaGroup:
        """Return the group of the processes with this one's number, of the numbers of all ranks."""
        ranks = dist.get_process_group_ranks(self.group)
        parts = {
            number: dist.new_group([ranks[i] for i in range(self.size) if part_of[i] == number])
            for number in sorted(set(part_of))
        }
        own = ReplicaGroup(parts[part_of[self.rank]])
        own._traffic = self._traffic
        return own

    def _raise_disagreement(self, when: str, facts: Sequence[Fact]) -> None:
        everyone: list[list[Fact]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, list(facts), group=self.group)
        rank, others = next((i, f) for i, f in enumerate(everyone) if f != everyone[0])
        fact, ours, theirs = first_difference(everyone[0], others)
        raise ValueError(
            f"the replicas cannot exchange {when}, because they differ in {fact.what}: rank 0 has {ours}, rank {rank}"
            f" has {theirs}. {fact.remedy}"
        )

    def _all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)
        self._count(tensor)

    def _gather(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all replicas, of equal shape, on the device of `own`."""
        sent = own.to(self._device(own))
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent, group=self.group)
        self._count(sent)
        return [one.to(own.device) for one in found]

    def _count(self, tensor: Tensor) -> None:
        self._traffic.sent += tensor.numel() * tensor.element_size()

    def _device(self, tensor: Tensor) -> torch.device:
        """Return the device that the group's backend needs: the CPU for gloo, this process's GPU for nccl."""
        backend = dist.get_backend(self.group)
        if backend == "gloo":
            return torch.device("cpu")
        if backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return tensor.device


def first_difference(own: Sequence[Fact], other: Sequence[Fact]) -> tuple[Fact, str, str]:
    """Return the first fact in which two replicas differ, and the first lines of it that do."""
    ours, theirs = next(pair for pair in zip(own, other, strict=False) if pair[0] != pair[1])
    lines = zip_longest(ours.value.split("\n"), theirs.value.split("\n"), fillvalue="nothing")
    return ours, *next(pair for pair in lines if pair[0] != pair[1])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device together, in order, up to `BUCKET` bytes unless one alone has more."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (
            held + size > BUCKET
            or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        ):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket
