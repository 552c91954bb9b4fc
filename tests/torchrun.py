"""Start torchrun as a user does, and the model and data of the runs that tests start so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.processes import ENVIRONMENT, ROOT, ended
from trainc.runtime.data.batch import Batch


def torchrun(
    ranks: int,
    *command: str,
    cwd: Path,
    restarts: int = 0,
    timeout: float = 200,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run `-m trainc ...`, or a file, in several processes of this machine; raises NotEnded."""
    program = command if command[0].endswith(".py") else ("-m", *command)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(ranks), "--local-addr", "127.0.0.1", "--master-port", port),
            *("--max-restarts", str(restarts), *program),
        ],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ((out, error),) = ended([process], timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


class Net(nn.Module):
    """Two blocks of a small residual network with five classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Dropping(Net):
    """The same with dropout, of which no module tells."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Points:
    """Points of five classes; of every third the class does not count."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 8, generator=generator)
        self.y = torch.randint(0, 5, (count,), generator=generator)
        self.y[::3] = -100

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = list(indices)
        return self.x[rows], self.y[rows]


class Noisy(Points):
    """The same with random numbers that are drawn for a batch as a whole."""

    def batch(self, indices: Sequence[int]) -> Batch:
        x, y = super().batch(indices)
        return x + 0.1 * torch.randn_like(x), y


class Failing(Points):
    """The same, where one rank meets with an accident when it has read some batches."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.read = 0

    def batch(self, indices: Sequence[int]) -> Batch:
        self.read += 1
        start = f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {os.environ['RANK']} {self.read}"
        match os.environ["ACCIDENTS"].split(","):
            case [*plan] if f"{start} kill" in plan:
                os.kill(os.getpid(), signal.SIGKILL)
            case [*plan] if f"{start} terminate" in plan:
                os.kill(os.getpid(), signal.SIGTERM)
            case [*plan] if f"{start} raise" in plan:
                raise KeyError("no such sample")
            case [*plan] if f"{start} sleep" in plan:
                time.sleep(1000)
        return super().batch(indices)


class Data:
    """Training and held-out samples whose numbers no number of processes divides."""

    tokens_per_sample = 1

    def __init__(self, kind: type[Points]) -> None:
        self.train, self.evaluation = kind(101, 1), Points(37, 2)


def points() -> Data:
    """Return plain data."""
    return Data(Points)


def noisy() -> Data:
    """Return data that draws random numbers."""
    return Data(Noisy)


def failing() -> Data:
    """Return data that fails on a rank."""
    return Data(Failing)


def loader() -> Any:
    """Return data with an order of its own, as torch's IterableDataset has it."""
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            samples = Points(64, 1)
            return iter(list(zip(samples.x, samples.y, strict=True)))

    return Stream(), Stream()


def spec(more: str = "", data: str = "points", batch: int = 12, micro: int = 3) -> str:
    """Return a spec over this model; the micro-batches of several processes end elsewhere than those of one."""
    return f"""train 1
model "tests.torchrun:Net"
data "tests.torchrun:{data}" {{ batch = {batch} samples, micro = {micro} samples }}
loss cross_entropy
optimizer adamw {{ lr = 1e-2 }}
run {{ length = 10 steps, seed = 3, eval = 4 steps, checkpoint = 3 steps, eval_batches = 20, device = cpu }}
{more}
"""
