"""What stands in for torchft: replicas are threads of which one runs at a time, and meet as a test says they do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.compiler.program import exchange_replicas
from trainc.runtime.processes import torchft_connection
from trainc.runtime.processes.replica_group import ReplicaLost
from trainc.runtime.processes.torchft_connection import State

LIMIT = 60


class Died(BaseException):
    """A replica ends here as a killed process does."""


@dataclass
class Meeting:
    """Who comes, as a test says; `dies` ends in the sum with a number, counted from 0, and `fails` cannot commit."""

    comes: Sequence[int]
    dies: tuple[int, int] | None = None
    fails: Sequence[int] = ()
    offers: dict[int, tuple[int, Callable[[], State]]] = field(default_factory=dict)
    given: dict[int, State] = field(default_factory=dict)
    sums: list[dict[int, Tensor]] = field(default_factory=list)
    dead: bool = False


class Members:
    """The replicas of a test and their meetings, in order."""

    def __init__(self, meetings: Iterable[Meeting]) -> None:
        self.meetings = [*meetings]
        self.turn = threading.Condition()
        self.ended: set[str] = set()

    def wait(self, until: Callable[[], bool]) -> None:
        assert self.turn.wait_for(until, LIMIT), "the others did not come"

    def run(self, replicas: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Run each replica in a thread; return what each found, or the error or the death that ended it."""
        found: dict[str, Any] = {}

        def be(name: str) -> None:
            with self.turn:
                try:
                    found[name] = replicas[name]()
                except (Exception, Died) as error:
                    found[name] = error
                self.ended.add(name)
                self.turn.notify_all()

        threads = [threading.Thread(target=be, args=(name,), daemon=True) for name in replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * LIMIT)
        assert len(found) == len(replicas)
        return found


class Member:
    """A connection of one replica, by its number."""

    stands = True

    def __init__(self, members: Members, number: int) -> None:
        self.members, self.number = members, number
        self.at = -1
        self.sums = 0
        self.failed: str | None = None

    @property
    def now(self) -> Meeting:
        return self.members.meetings[self.at]

    @property
    def present(self) -> int:
        return len(self.now.comes)

    @property
    def place(self) -> int:
        return sorted(self.now.comes).index(self.number)

    def meet(self, progress: int, give: Callable[[], State]) -> State | None:
        meetings = self.members.meetings
        left = range(self.at + 1, len(meetings))
        self.at = next(
            i
            for i in left
            if self.number in meetings[i].comes and self.number not in meetings[i].offers
        )
        self.sums, self.failed, now = 0, None, self.now
        now.offers[self.number] = progress, give
        if len(now.offers) == len(now.comes):
            most = max(one for one, _ in now.offers.values())
            first = min(n for n, (one, _) in now.offers.items() if one == most)
            behind = [
                n for n, (one, _) in now.offers.items() if one < most or (not most and n != first)
            ]
            now.given = {n: now.offers[first][1]() for n in behind}
            self.members.turn.notify_all()
        self.members.wait(lambda: len(now.offers) == len(now.comes))
        if self.number in now.fails:
            self.failed = "the network failed"
        return now.given.get(self.number)

    def sum(self, tensor: Tensor) -> None:
        now, at = self.now, self.sums
        self.sums += 1
        if now.dies == (self.number, at):
            now.dead = True
            self.members.turn.notify_all()
            raise Died
        if len(now.sums) == at:
            now.sums.append({})
        now.sums[at][self.number] = tensor.clone()
        self.members.turn.notify_all()
        self.members.wait(lambda: now.dead or len(now.sums[at]) == len(now.comes))
        if len(now.sums[at]) < len(now.comes):
            self.failed = "a connection was closed"
            raise ReplicaLost(self.failed)
        tensor.copy_(torch.stack([now.sums[at][n] for n in sorted(now.comes)]).sum(0))

    def fail(self, error: Exception) -> None:
        self.failed = str(error)

    def commit(self) -> str | None:
        return self.failed

    def close(self) -> None:
        """Leave: who sums after this sees that it is gone."""
        with self.members.turn:
            if self.at >= 0:
                self.now.dead = True
                self.members.turn.notify_all()


def stand_in(patch: pytest.MonkeyPatch, members: Members | None) -> threading.local:
    """Let programs meet `members`; the `number` of what is returned is that of the replica of a thread."""
    of = threading.local()
    of.number = 0
    patch.setattr(torchft_connection, "has_library", lambda: True)
    patch.setattr(
        exchange_replicas,
        "find_place",
        lambda: None if members is None else ("http://nowhere:1", of.number),
    )
    if members is not None:
        patch.setattr(exchange_replicas, "Connection", lambda _, number: Member(members, number))
    return of
