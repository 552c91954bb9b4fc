"""The processes of one run as a team: rank 0 shows, writes and decides, and all go on alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.processes.watch import Watch

Found = TypeVar("Found")
_CLAIM = "the folder of the run"
REQUESTS = (None, "interrupted", "terminated")
"""What a process may be asked for; of two requests the later one here counts."""


class Team:
    """A run in one process, which is its whole team."""

    rank, size = 0, 1
    apart = False
    """Whether each process trains a replica of its own, with steps and weights of its own: then it is an `Apart`."""

    def __init__(self, store: Any = None) -> None:
        self._store = store
        """What stays when a launcher starts the processes again; None where none does."""

    def at(self, what: str) -> None:
        """Say what this process begins to do, for messages about one that is late."""

    def claim(self, folder: Path) -> None:
        """Say, on rank 0, that this launch writes to a folder, so that it goes on there when it is started again."""
        if self._store is not None:
            self._store.set(_CLAIM, str(folder.resolve()))

    def claimed(self, folder: Path) -> bool:
        """Return, on rank 0, whether this launch was started again and wrote to a folder before."""
        if self._store is None or not self._store.check([_CLAIM]):
            return False
        return bool(self._store.get(_CLAIM) == str(folder.resolve()).encode())

    def watched(self, requested: Callable[[], str | None], ended: Callable[[str], None]) -> None:
        """Be ended by the watch where another process is lost or late; `ended` is told why, just before."""

    def decided(self, decide: Callable[[], Found]) -> Found:
        """Return what rank 0 decides, as JSON can hold it; the others do not call `decide`."""
        return decide()

    def compare(self, agree: Callable[[ReplicaGroup], None]) -> None:
        """Let all processes check that they agree."""

    def first(self, found: str | None) -> str | None:
        """Return what the lowest rank found that found something."""
        return found

    def after_step(self, requested: Callable[[], str | None], seconds: float) -> float:
        """Tell the others that this process was asked to stop, and return how many seconds a step took on rank 0."""
        return seconds

    def requested(self, own: Callable[[], str | None]) -> str | None:
        """Return whether a process was asked to stop, as all of them know since the last `after_step`."""
        return own()

    def sums(self, pairs: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Return sums over all processes of pairs of numbers by name, which not every process has all of."""
        return dict(pairs)

    def each(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank, as JSON can hold them."""
        return [value]

    def of_first(self, found: dict[str, float]) -> dict[str, float]:
        """Return the numbers of rank 0 where each process measured its own; else all have the same."""
        return found


class Ranks(Team):
    """A run in several processes."""

    def __init__(self, group: ReplicaGroup, watch: Watch | None = None, store: Any = None) -> None:
        super().__init__(store)
        self.rank, self.size = group.rank, group.size
        self.group, self.watch = group, watch
        self._requested: str | None = None

    def at(self, what: str) -> None:
        if self.watch is not None:
            self.watch.at(what)

    def watched(self, requested: Callable[[], str | None], ended: Callable[[str], None]) -> None:
        if self.watch is not None:
            self.watch.stop_requested, self.watch.before_end = requested, ended

    def decided(self, decide: Callable[[], Found]) -> Found:
        text = json.dumps(decide()) if self.rank == 0 else ""
        found: Found = json.loads(self._text_from(0, text))
        return found

    def compare(self, agree: Callable[[ReplicaGroup], None]) -> None:
        agree(self.group)

    def first(self, found: str | None) -> str | None:
        has = self.group.gather_rows([float(found is not None)])[:, 0]
        if not has.any():
            return None
        return self._text_from(int(has.argmax()), found or "")

    def after_step(self, requested: Callable[[], str | None], seconds: float) -> float:
        rows = self.group.gather_rows([float(REQUESTS.index(requested())), seconds])
        self._requested = REQUESTS[int(rows[:, 0].max())]
        return float(rows[0, 1])

    def requested(self, own: Callable[[], str | None]) -> str | None:
        return self._requested

    def sums(self, pairs: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        every = self.each({name: list(pair) for name, pair in pairs.items()})
        names = dict.fromkeys(name for one in every for name in one)
        totals = {
            name: [
                sum(column) for column in zip(*(o[name] for o in every if name in o), strict=True)
            ]
            for name in names
        }
        return {name: (total, count) for name, (total, count) in totals.items()}

    def each(self, value: Any) -> list[Any]:
        text = json.dumps(value)
        return [json.loads(self._text_from(rank, text)) for rank in range(self.size)]

    def _text_from(self, source: int, text: str) -> str:
        """Return the text that one rank gives, on all of them."""
        own = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        self.group.copy_from(source, [length])
        sent = own if self.rank == source else torch.zeros(max(int(length), 1), dtype=torch.uint8)
        self.group.copy_from(source, [sent])
        return bytes(sent[: int(length)].tolist()).decode()
