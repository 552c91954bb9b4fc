"""Watch the processes of a run: one that fails, or stays where it is for too long, ends all, and is named.

The main thread of a process that waits for another can say nothing, so that a thread of its own tells where it is, and
reads where the others are. What they tell goes through the store of the launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from sysconfig import get_path
from types import FrameType
from typing import Any

import torch.distributed as dist

from trainc.runtime.processes.replica_group import ReplicaLost

TICK, GRACE = 0.5, 5.0
"""Seconds between two looks at the others, and those that a process has to end by itself once another failed."""
_FAILED, _TOLD = "failed", "late is told"
_WAITING = ("torch/distributed/", "torch/nn/parallel/", "runtime/processes/")
_BACKWARD = "_engine_run_backward"
_BROKEN = re.compile(r"gloo/|NCCL error|Connection (?:closed|reset) by peer|Broken pipe")
"""What torch says, in a RuntimeError, of a connection to a process that ended."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is: the number of its phase, counted from the start, what it does, and for how many seconds.

    `code` is the line of the user's own that runs. `waits`: it is in an exchange, or in a backward pass that may hold
    one. `beat` grows while the process is alive.
    """

    phase: int = 0
    what: str = "starting"
    seconds: float = 0.0
    code: str = ""
    waits: bool = False
    beat: int = 0


class Watch(threading.Thread):
    """Tells where this process is, and ends it where a process of the run is later than `timeout` seconds."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.stop_requested: Callable[[], object] = lambda: None
        """Whether the process was asked to stop, as torchrun asks where another one died."""
        self.before_end: Callable[[str], None] = lambda message: None
        """Is told why the process ends, just before."""
        self._main = threading.main_thread().ident or 0
        self._now: tuple[int, str, float] = (0, "starting", time.monotonic())
        self._failed_at: float | None = None
        self._beats: dict[int, tuple[int, float]] = {}
        self._done = threading.Event()

    def at(self, what: str) -> None:
        """Say what this process begins to do."""
        self._now = (self._now[0] + 1, what, time.monotonic())

    def close(self) -> None:
        """Watch no longer: the run has ended."""
        self._done.set()
        self.join(timeout=GRACE)

    def fail(self) -> bool:
        """Say that this process ends with an error; return whether it is the first, and not because of another."""
        with contextlib.suppress(RuntimeError):  # the store ended with the launcher
            return bool(self.store.compare_set(_FAILED, "", str(self.rank)) == b"%d" % self.rank)
        return True

    def other_failed(self) -> OtherRankFailed:
        """Return the error of this process where an exchange broke: it names the rank that failed, if one says so."""
        ends = time.monotonic() + TICK / 2
        while (rank := self.failed()) is None and time.monotonic() < ends:
            time.sleep(TICK / 10)
        return OtherRankFailed(rank, self.rank)

    def failed(self) -> int | None:
        """Return the rank of the process that failed first; None while none has."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([_FAILED]):
                return int(self.store.get(_FAILED))
        return None

    def run(self) -> None:
        beat = 0
        while not self._done.wait(min(TICK, self.timeout / 4)):
            beat += 1
            try:
                self.store.set(f"place/{self.rank}", json.dumps(_fields(self._place(beat))))
                failed, places = self.failed(), self._places()
            except RuntimeError:  # the launcher is gone, and ends this process as well
                return
            if failed is not None and failed != self.rank:
                self._end_after_failure()
            silent = self._silent(places)
            if all(place is not None for place in places):
                self._end_late([place for place in places if place is not None], silent)
            self._end_without(silent)

    def _place(self, beat: int) -> Place:
        phase, what, since = self._now
        frame = sys._current_frames().get(self._main)
        code, waits = ("", False) if frame is None else (_own_line(frame), _is_waiting(frame))
        return Place(phase, what, time.monotonic() - since, code, waits, beat)

    def _places(self) -> list[Place | None]:
        keys = [f"place/{rank}" for rank in range(self.size)]
        if self.store.check(keys):
            return [Place(**json.loads(text)) for text in self.store.multi_get(keys)]
        return [None] * self.size

    def _end_after_failure(self) -> None:
        """End this process where another has failed some seconds ago: NCCL would let it wait for that one."""
        self._failed_at = self._failed_at or time.monotonic()
        if time.monotonic() - self._failed_at > GRACE:
            self._end("")

    def _silent(self, places: Sequence[Place | None]) -> dict[int, float]:
        """Return for how many seconds ranks have shown no sign of life, of those that have not for some seconds."""
        now = time.monotonic()
        for rank, place in enumerate(places):
            beat = 0 if place is None else place.beat
            if self._beats.get(rank, (-1, 0.0))[0] != beat:
                self._beats[rank] = (beat, now)
        ages = {rank: now - since for rank, (_, since) in self._beats.items()}
        return {rank: age for rank, age in ages.items() if age > GRACE}

    def _end_without(self, silent: Mapping[int, float]) -> None:
        """End this process where it was asked to stop, and waits for one that shows no sign of life."""
        if silent and self.stop_requested() and time.monotonic() - self._now[2] > GRACE:
            self._end(f"rank {min(silent)} has ended, and rank {self.rank} waited for it")

    def _end_late(self, places: Sequence[Place], silent: Mapping[int, float]) -> None:
        """End this process, as all others do, where one has been in its phase for too long."""
        if max(place.seconds for place in places) <= self.timeout:
            return
        late = [*silent] or late_ranks(places)
        # The one that writes it down ends first, since an exchange with one that has ended is another error; then those
        # that it is about.
        time.sleep(0.0 if self.rank == 0 else (2 if self.rank in late else 3) * TICK)
        message = describe_late(late, places, self.timeout, silent)
        self._end(message, told=self.store.add(_TOLD, 1) > 1)

    def _end(self, message: str, *, told: bool = False) -> None:
        """End the process; say why where nobody has told it."""
        with contextlib.suppress(Exception):
            self.before_end(message)
        if message and not told:
            print(f"trainc: {message}", file=sys.stderr, flush=True)
        os._exit(1)


class OtherRankFailed(RuntimeError):
    """Another process of the run has failed, so that this one ends as well; `rank` is which, if it could say so."""

    def __init__(self, rank: int | None, own: int) -> None:
        self.rank = rank
        who = "another rank" if rank is None else f"rank {rank}"
        how = (
            "has ended without an error of its own, as a killed one does"
            if rank is None
            else "has failed"
        )
        super().__init__(f"{who} {how}, so that rank {own} ends as well")


def follows_from_another(error: BaseException) -> bool:
    """Say whether an error is that of an exchange with a process that is no longer there."""
    if isinstance(error, ReplicaLost | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _fields(place: Place) -> dict[str, object]:
    return {name: getattr(place, name) for name in Place.__dataclass_fields__}


def late_ranks(places: Sequence[Place]) -> list[int]:
    """Return the ranks that the others wait for: those in the earliest phase, of these those that wait for none."""
    first = min(place.phase for place in places)
    behind = [rank for rank, place in enumerate(places) if place.phase == first]
    return (
        [rank for rank in behind if not places[rank].waits and places[rank].code]
        or [rank for rank in behind if not places[rank].waits]
        or behind
    )


def describe_late(
    late: Sequence[int], places: Sequence[Place], timeout: float, silent: Mapping[int, float]
) -> str:
    """Return in words who is late, where, and what to do; `silent` ones are asleep, or their machine is lost."""
    rank = late[0]
    place = places[rank]
    who = f"rank {rank}" + (f" (and {len(late) - 1} other ranks)" if len(late) > 1 else "")
    if rank in silent:
        found = f"{who} has shown no sign of life for {silent[rank]:.0f} seconds, and was {place.what} before that"
    else:
        at = f", at {place.code}" if place.code else ""
        found = f"{who} has been {place.what} for {place.seconds:.0f} seconds{at}"
    return (
        f"{found}; the others wait for it. The `timeout` of the `distribute` clause is {timeout:g} seconds: find out"
        " what holds the rank up, or write a longer time"
    )


def _is_waiting(frame: FrameType) -> bool:
    name = frame.f_code.co_filename.replace(os.sep, "/")
    return frame.f_code.co_name == _BACKWARD or any(part in name for part in _WAITING)


def _own_line(frame: FrameType) -> str:
    """Return the innermost line of code that is neither installed nor trainc's; empty where there is none."""
    for one, line in traceback.walk_stack(frame):
        name = one.f_code.co_filename
        if not name.startswith("<") and not any(Path(name).is_relative_to(p) for p in _foreign()):
            return f"{name}:{line} in {one.f_code.co_name}"
    return ""


@cache
def _foreign() -> tuple[Path, ...]:
    """Return the folders of Python, of installed packages, and of trainc."""
    root = Path(__file__).parents[2]
    own = tuple(root / name for name in ("trainc", "dsl", "kernels", "runtime", "compiler"))
    installed = (Path(get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    torch = Path(dist.__file__).parents[2]
    return (*own, *installed, torch)
