"""Start a test's file as several processes that train together, and be one of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist

from tests.forks import Forked, fork

ROOT = Path(__file__).parents[1]
PATIENCE = 60
"""Seconds for which a rank that is done waits for the others."""


ENVIRONMENT = {
    # Gloo and torchrun look for the name of the machine: where nothing answers, each look-up takes 10 seconds.
    "RES_OPTIONS": "timeout:1 attempts:1",
    "GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name.startswith("lo")),
    "PYTHONFAULTHANDLER": "1",
}
"""What processes on one machine are started with, beside what they inherit."""


class NotEnded(AssertionError):
    """Processes were not ended after the time they have."""


def run_processes(
    file: str | Path, ranks: int, folder: Path, *, timeout: float = 120, weights_only: bool = True
) -> list[Any]:
    """Run a file that calls `run_rank` as `ranks` processes; return what each rank's work returned.

    Fails with the errors of all processes unless each ends with 0.
    """
    commands = [[str(file), str(rank), str(ranks), str(folder)] for rank in range(ranks)]
    started = fork(commands, environment())
    errors = [error for _, error in ended(started, timeout)]
    assert not any(process.returncode for process in started), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=weights_only) for rank in range(ranks)]


def ended(
    started: Sequence[subprocess.Popen[str] | Forked], timeout: float
) -> list[tuple[str | None, str]]:
    """Wait for processes that lead sessions of their own; return what each wrote to stdout and stderr.

    Where they take longer than `timeout` seconds they are ended, and the error has what they wrote and where each of
    their threads was.
    """
    ends = time.monotonic() + timeout
    try:
        return [process.communicate(timeout=max(ends - time.monotonic(), 0)) for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            with suppress(psutil.NoSuchProcess):  # it has ended by now
                for child in (*psutil.Process(process.pid).children(), process):
                    child.send_signal(signal.SIGABRT)
        written = [process.communicate() for process in started]
        raise NotEnded(
            "\n".join(
                [
                    f"not ended after {timeout:g} seconds",
                    *(text or "" for one in written for text in one),
                ]
            )
        ) from None


def environment() -> dict[str, str]:
    """Return what a process that is one of several is started with: it finds libraries where this one does."""
    own = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join((str(ROOT), *own))}


def run_rank(work: Callable[[int], Any], *, leaving: Collection[int] = ()) -> NoReturn:
    """Join the group that `run_processes` named, save what `work(rank)` returns, and end this process.

    A rank that is done waits for the others, unless it is one of those `leaving` them: its connections must stand until
    they need them no more. A barrier would not do: a group that has lost a replica cannot have one. The process ends
    without Python's own clean-up: a thread of gloo that asks for the interpreter meanwhile brings it down now and then
    ("terminate called without an active exception").
    """
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    torch.save(work(rank), f"{folder}/{rank}.pt")
    ends = time.monotonic() + PATIENCE
    while (
        rank not in leaving
        and time.monotonic() < ends
        and not all(Path(f"{folder}/{other}.pt").exists() for other in range(ranks))
    ):
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
