"""Replicas that may leave and join while others go on, each one process: every meeting finds who is there."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.processes.replica_group import (
    Fact,
    ReplicaGroup,
    ReplicaLost,
    Traffic,
    first_difference,
)
from trainc.runtime.processes.torchft_connection import NUMBER, Connection, State

_STEPS = 2**32


class OtherReplica(ValueError):
    """This replica differs from most of the others in what all must agree on."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a replica is: those of most turns, and then of most steps, are up to date; the others take over from one.

    `trains`: it comes to a turn after a step, not before its first. `batch` is the size of its batch, 0 for any.
    """

    turns: int
    steps: int
    trains: bool
    batch: int = 0

    @property
    def progress(self) -> int:
        """Return a number that grows with the turns, and then with the steps."""
        return self.turns * _STEPS + self.steps


class ElasticGroup(ReplicaGroup):
    """The replicas that meet now: means are over the `size` of them that are up to date.

    `rank` is the number of this one, which no meeting changes. `give` returns the state that one which is behind goes
    on from, at a clock, and `take` loads it; `same` is what all must agree on in every meeting. All that are present
    must call a method alike, between `meet` and `commit`.
    """

    def __init__(
        self,
        connection: Connection,
        number: int,
        give: Callable[[Any], State],
        take: Callable[[State], None],
        same: Sequence[Fact] = (),
    ) -> None:
        self.group, self.rank, self.size = None, number, 1
        self._traffic = Traffic()
        self.give, self.take, self.same = give, take, same
        self._connection, self._counts = connection, True
        self._numbers: list[int] = [number]
        # A program that is forgotten must not seem to be a replica that is late.
        weakref.finalize(self, connection.close)

    @property
    def stands(self) -> bool:
        """Whether what finds the replicas answered last."""
        return self._connection.stands

    def meet(self, own: Standing, clock: Any) -> State | None:
        """Wait for the replicas that are alive; return the state of another where this one is behind, at a clock.

        Raises ReplicaLost where no meeting comes about.
        """
        self._counts = True
        received = self._connection.meet(own.progress, lambda: self.give(clock))
        self._counts = received is None
        return received

    def compare(self, own: Standing, facts: Sequence[Fact]) -> bool:
        """Find whose weights count, and return whether one of the replicas is in a turn.

        Raises OtherReplica where this one has other facts, or another batch, than most, or the number of another one,
        and ReplicaLost where that is so of another one: it leaves.
        """
        facts = [*self.same, *facts]
        batch = own.batch if self._counts else 0
        rows = self._rows([self.rank, self._counts, own.trains, batch, _digest(facts)])
        numbers, counts, trains, batches, digests = (
            [row[i] for row in rows] for i in range(len(rows[0]))
        )
        self.size = sum(counts)
        self._numbers = [n for n, one in zip(numbers, counts, strict=True) if one]
        if len(set(digests)) > 1:
            self._refuse_facts(facts, digests, numbers)
        if len(set(numbers)) < len(numbers):
            self._refuse_number(numbers, counts)
        if len(set(batches) - {0}) > 1:
            self._refuse_batch(batch, batches, numbers)
        return any(trains)

    def gather_rows(self, numbers: Sequence[float]) -> Tensor:
        """Return the numbers of this replica alone: between two turns it decides without the others."""
        return torch.tensor([numbers], dtype=torch.float64)

    def rows_in_turn(self, numbers: Sequence[float]) -> Tensor:
        table = torch.zeros(self._connection.present, 1 + len(numbers), dtype=torch.float64)
        table[self._connection.place] = torch.tensor(
            [float(self._counts), *numbers], dtype=torch.float64
        )
        self._sum(table)
        return table[table[:, 0] > 0, 1:]

    def numbers_in_turn(self) -> list[int]:
        return self._numbers

    def commit(self) -> str | None:
        """End the meeting; return why nothing of it may be kept, None where all went well here."""
        return self._connection.commit()

    def leave(self) -> None:
        """Leave the replicas; the next meeting joins them anew."""
        self._connection.close()

    # inside

    def _rows(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the whole numbers of all that are present, in the order of their places."""
        table = torch.zeros(self._connection.present, len(numbers), dtype=torch.int64)
        table[self._connection.place] = torch.tensor(numbers)
        self._sum(table)
        found: list[list[int]] = table.tolist()
        return found

    def _texts(self, own: str) -> list[str]:
        """Return the texts of all that are present, none of them empty, in the order of their places."""
        sent = torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8)
        lengths = [row[0] for row in self._rows([len(sent)])]
        table = torch.zeros(len(lengths), max(lengths), dtype=torch.uint8)
        table[self._connection.place, : len(sent)] = sent
        self._sum(table)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(table, lengths, strict=True)]

    def _refuse_facts(
        self, facts: Sequence[Fact], digests: Sequence[int], numbers: Sequence[int]
    ) -> None:
        texts, most = self._texts(json.dumps(facts)), _most(digests)
        if digests[self._connection.place] == most:
            raise self._another_differs()
        other = digests.index(most)
        fact, ours, theirs = first_difference(facts, [Fact(*f) for f in json.loads(texts[other])])
        raise OtherReplica(
            f"replica {self.rank} cannot exchange with the others, because they differ in {fact.what}: it has {ours},"
            f" and replica {numbers[other]} has {theirs}. {fact.remedy}"
        )

    def _refuse_number(self, numbers: Sequence[int], counts: Sequence[int]) -> None:
        # Of two with one number that stays which was there before, since its weights count.
        same = [place for place, number in enumerate(numbers) if number == self.rank]
        if self._connection.place == max(same, key=lambda place: (counts[place], -place)):
            raise self._another_differs()
        raise OtherReplica(
            f"another replica has the number {self.rank}, too: give each a {NUMBER} of its own"
        )

    def _refuse_batch(self, own: int, batches: Sequence[int], numbers: Sequence[int]) -> None:
        most = _most([size for size in batches if size])
        if own in (0, most):
            raise self._another_differs()
        raise OtherReplica(
            f"replica {self.rank} has a batch of {own} samples, and replica {numbers[batches.index(most)]} one of"
            f" {most}. A rule or a policy decides by what its own replica measured: let it read the clock, or remove it"
        )

    def _another_differs(self) -> ReplicaLost:
        """Return what ends a meeting in which another replica finds that it is no replica of these."""
        error = ReplicaLost("a replica came that differs from the others, and it leaves again")
        self._connection.fail(error)
        return error

    def _all_reduce(self, tensor: Tensor) -> None:
        if not self._counts:
            tensor.zero_()
        self._sum(tensor)

    def _sum(self, tensor: Tensor) -> None:
        self._connection.sum(tensor)
        self._count(tensor)

    def _device(self, tensor: Tensor) -> torch.device:
        return torch.device("cpu")


def _digest(facts: Sequence[Fact]) -> int:
    text = "\n".join(f"{fact.what}\n{fact.value}" for fact in facts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _most(values: Sequence[int]) -> int:
    """Return the value that most have; of several the one that comes first."""
    return Counter(values).most_common(1)[0][0]
