"""Run rows one by one in a process of their own, which may hang, crash or lose the device without losing a row.

The process is forked before anything touches a device, so starting one again takes no time.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import Cuda
from benchmarks.measure import Json
from benchmarks.on_gpu.record import Judge, Record, Row, commit, digest

GRACE = 30.0
"""Seconds that a row may take beyond twice its own before its process is ended: the first compilations are slow."""
START = 120.0
"""Seconds in which a process has to find its device."""
Say = Callable[[Json, Json], None]


def supervise(
    rows: Sequence[Row],
    device: Callable[[], Cuda],
    out: Path | None,
    seconds: float,
    say: Say,
    judge: Judge,
) -> Json | None:
    """Run the rows that do not stand yet, as long as they end before the seconds do; None where there is no device.

    `say(row, found)` is called with every row and with all that is known, also for rows of an earlier start. What ended
    a process in which no row ran is `stopped` in what is returned. Raises Unusable where that was at the first start.
    """
    finish = time.monotonic() + seconds
    record: Record | None = None
    tried: set[str] = set()
    while True:
        with _Worker(rows, device, finish) as worker:
            try:
                about = worker.about()
            except Unusable as error:
                if record is None:
                    raise
                record.found["stopped"] = str(error)
                record.write()
                return record.found
            if about is None:
                return None
            if record is None:
                record = Record(out, about, judge)
                todo = record.outstanding(rows)
                for row in rows:
                    if row.key not in todo and (found := record.standing(row.key)) is not None:
                        say(found, record.found)
            ended = worker.run([key for key in todo if key not in tried], record, tried, say)
        if ended:
            record.write()
            return record.found


class _Worker:
    """The process, and the parent's side of what is said to it."""

    def __init__(self, rows: Sequence[Row], device: Callable[[], Cuda], finish: float) -> None:
        context = multiprocessing.get_context("fork")
        self.rows, self.finish = {row.key: row for row in rows}, finish
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.rows, device, finish))
        self.process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.join(timeout=5 if raised[0] is None else 0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()

    def about(self) -> Json | None:
        """Return what the process says of its device; raises Unusable where it says nothing."""
        if not self.connection.poll(START):
            raise Unusable(f"the device was not ready within {START:.0f} s")
        try:
            found: Json | None = self.connection.recv()[1]
        except (EOFError, ConnectionResetError):
            raise Unusable(
                f"{self._end()} before it named its device; its own message stands above"
            ) from None
        return found

    def run(self, keys: list[str], record: Record, tried: set[str], say: Say) -> bool:
        """Keep what comes back; return whether the process came to its end by itself."""
        self.connection.send(keys)
        key, limit = None, START
        while True:
            if not self.connection.poll(limit):
                return self._lost(key, f"took more than {limit:.0f} s", record, say)
            try:
                kind, what = self.connection.recv()
            except (EOFError, ConnectionResetError):
                return self._lost(key, self._end(), record, say)
            if kind == "begin":
                left = max(0.0, self.finish - time.monotonic())
                key, limit = what, min(2 * self.rows[what].seconds, left) + GRACE
                tried.add(key)
            elif kind == "end":
                record.add(what)
                say(what, record.found)
                if what.get("lost"):
                    return False
                key, limit = None, START
            elif kind == "done":
                return True
            elif what not in record.found[kind]:
                record.found[kind].append(what)
                record.write()

    def _end(self) -> str:
        """Say how the process ended."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        return f"its process ended with {signal.Signals(-code).name if code is not None and code < 0 else code}"

    def _lost(self, key: str | None, why: str, record: Record, say: Say) -> bool:
        """Say of the row that ran what ended it; where none ran, there is no use in going on, which is said too."""
        self.process.kill()
        if key is None:
            record.found["stopped"] = f"{why}, while no row ran"
            return True
        row = self.rows[key]
        record.add({"key": key, "part": row.part, "name": row.name, "failed": why})
        say(record.found["rows"][-1], record.found)
        return False


def _work(
    parent: Connection, rows: dict[str, Row], device: Callable[[], Cuda], finish: float
) -> None:
    """Be the process: say what the device is, hear which rows to run, and run them."""
    with suppress(BrokenPipeError, ConnectionResetError, EOFError):
        try:
            here = device()
        except NoDevice:
            parent.send(("about", None))
            return
        parent.send(("about", _about(here)))
        keys = parent.recv()
        # Everything of a row runs on one stream that is not the default one, which captures cannot take.
        with here.side_stream():
            parent.send(("conditions", here.conditions("start")))
            for key in keys:
                if time.monotonic() + rows[key].seconds > finish:
                    parent.send(("left out", key))
                    continue
                parent.send(("begin", key))
                parent.send(("end", found := _attempt(rows[key], here, finish)))
                if found.get("lost"):
                    parent.close()
                    os._exit(3)
            parent.send(("conditions", here.conditions("end")))
        parent.send(("done", None))


class NoDevice(Exception):
    """There is nothing to measure on."""


class Unusable(Exception):
    """The process that measures did not get as far as its device."""


def _about(device: Cuda) -> Json:
    return {
        "device": device.name(),
        "versions": device.versions(),
        "sources": digest(),
        "commit": commit(),
        "taken": datetime.now(UTC).date().isoformat(),
    }


def _attempt(row: Row, device: Cuda, finish: float) -> Json:
    """Run one row; a failure is what is found of it, and one that the device does not survive is `lost`."""
    found: Json = {"key": row.key, "part": row.part, "name": row.name}
    begin = time.monotonic()
    torch.manual_seed(time.time_ns() % (1 << 31))  # fresh inputs, every run
    try:
        found |= row.run(device, min(begin + row.seconds, finish))
    except Exception as error:  # a row that fails is a result, and costs itself alone
        found |= {"passed": False, "failed": first_line(error)}
    try:
        device.clear()
    except Exception as error:  # the device is lost, whatever it raises
        found |= {"passed": False, "failed": found.get("failed", first_line(error)), "lost": True}
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]


def cuda() -> Any:
    """Return the current CUDA device, for a process that may touch it."""
    if not torch.cuda.is_available():
        raise NoDevice
    return Cuda()
