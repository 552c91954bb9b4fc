"""Start a test's file as several processes that train together, and be one of them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PATIENCE = 60
"""Seconds for which a rank that is done waits for the others."""


def run_processes(
    file: str | Path, ranks: int, folder: Path, *, timeout: float = 120, weights_only: bool = True
) -> list[Any]:
    """Run a file that calls `run_rank` as `ranks` processes; return what each rank's work returned.

    Fails with the errors of all processes unless each ends with 0.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-P", str(file), str(rank), str(ranks), str(folder)],
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *_search_path()))},
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=timeout)[1].decode() for process in started]
    assert not any(process.returncode for process in started), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=weights_only) for rank in range(ranks)]


def _search_path() -> list[str]:
    """Return the folders in which this process finds libraries beside those of its environment."""
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def run_rank(work: Callable[[int], Any]) -> NoReturn:
    """Join the group that `run_processes` named, save what `work(rank)` returns, and end this process.

    A rank that is done waits for the others: its connections must stand until they need them no more. A barrier
    would not do: a group that has lost a replica cannot have one. The process ends without Python's own clean-up:
    a thread of gloo that asks for the interpreter meanwhile brings it down now and then ("terminate called
    without an active exception").
    """
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    torch.save(work(rank), f"{folder}/{rank}.pt")
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends and not all(
        Path(f"{folder}/{other}.pt").exists() for other in range(ranks)
    ):
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
