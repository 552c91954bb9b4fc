"""Runs whose processes train a replica each, one after the other: torchrun starts this file for its tests."""

import inspect
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import trainc
from tests.compiler.launched_runs import cut
from tests.torchrun import Data, Net, Points, spec
from trainc.compiler.constructs.lr.trust_ratio import ScaleGradients
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.batch import Batch
from trainc.runtime.data.order import Order, split_indices
from trainc.runtime.device.hardware import find_hardware
from trainc.runtime.processes.launch import find_launch, joined
from trainc.runtime.step.gradients import ParameterGradient
from trainc.runtime.step.record import Step
from trainc.runtime.storage.random_streams import seed_step

SEED, STEPS, SAMPLES = 3, 10, 101
OUTER = "outer(sgd(lr = 0.7, momentum = 0.9, nesterov = true))"


class Dropping(Net):
    """A network with dropout and running statistics, whose numbers are those of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.drop(self.norm(x)))


class Poisoned(Points):
    """Points of which one is not a number, so that the replica that reads it has a loss that is none."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.x[Order(SEED, SAMPLES).indices(0, 2 * 4 * 4)[-1]] = math.nan  # rank 1's last in step 4


class Holding(Points):
    """Points to which noise of a generator of their own is added."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, indices: Sequence[int]) -> Batch:
        x, y = super().batch(indices)
        return x + 0.1 * torch.randn(x.shape, generator=self.generator), y


class Single(Dataset[Any]):
    """Points one by one, with noise of the global generator, which worker processes may read."""

    def __init__(self, count: int, seed: int) -> None:
        self.points = Points(count, seed)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        x, y = self.points.x[index], self.points.y[index]
        return x + 0.1 * torch.randn(8), y


def poisoned() -> Data:
    """Return data of which one sample is not a number."""
    return Data(Poisoned)


def holding() -> Data:
    """Return data that holds a generator."""
    return Data(Holding)


def singles() -> tuple[Single, Single]:
    """Return data sets of single samples."""
    return Single(SAMPLES, 1), Single(37, 2)


def apart(fields: str = "", more: str = "", data: str = "tests.torchrun:points") -> str:
    """Return a spec whose replicas meet after every third of ten steps."""
    text = spec(f"distribute local every 3 steps {{ {fields} }} {more}", batch=4, micro=2)
    text = text.replace("tests.torchrun:points", data).replace("batches = 20", "batches = 4")
    return text.replace("tests.torchrun:Net", "tests.compiler.apart_runs:Dropping")


LEADER = (
    "rule = leader, pull = 0.3, prox = [0.1, 0.2], groups = 2, global_every = 2, buffers = local"
)
CASES = {
    "average": apart("optimizer_state = average"),
    "outer": apart(f"rule = {OUTER}"),
    "leader": apart("rule = leader, pull = 0.3, buffers = local"),
    "combined": apart(
        more="regularize ema { decay = 0.8 } noise_scale gns on type(LayerNorm) { smooth = 3 steps }"
        " regularize pace on type(Linear) { sigma = 0.1, weight = 0.5 }"
    )
    .replace("lr = 1e-2", "lr = 1e-2, clip = 0.5")
    .replace("tests.compiler.apart_runs:Dropping", "tests.torchrun:Net"),
    "adapted": apart(more='adapt lora on "blocks.**" & type(Linear) { rank = 2, alpha = 4 }'),
}
"""Specs whose runs have the numbers of a loop of one's own over the same samples."""
GROUPS = {"groups": apart(LEADER).replace("length", "on_nan = skip, length")}
"""The same, of four processes."""
READ = {
    "singles": apart(data="tests.compiler.apart_runs:singles"),
    "workers": apart(data="tests.compiler.apart_runs:singles").replace(
        "micro", "workers = 1, micro"
    ),
    "holding": apart(data="tests.compiler.apart_runs:holding"),
    "stream": apart(data="tests.torchrun:loader"),
}
"""Specs whose data is read in another way."""
POISONED = apart(data="tests.compiler.apart_runs:poisoned")
SPOILED = apart(more="lr trust_ratio { of = gradient }").replace("adamw", "sgd")
"""A spec with a clause that changes gradients, which a test lets spoil those of one replica."""
ENDED = {
    "nan": POISONED,
    "skipped": POISONED.replace("length", "on_nan = skip, length"),
    "spoiled": SPOILED,
    "spoiled and skipped": SPOILED.replace("length", "on_nan = skip, length"),
    "stopped": apart(more="when loss < 1.3 { stop }"),
    "saved": apart(more="when loss < 1.3 cooldown 100% { save }"),
    "evaluated": apart(more="when eval_loss < 1e9 { stop }"),
    "rolled back": apart(
        more="when steps >= 5 cooldown 100% { rollback, adamw.lr = 0.5 * adamw.lr }"
    ).replace("batch = 4 samples", "batch = 8 samples"),
    "batches": apart(more="when steps >= 2 { batch = 8 } when eval_loss > 0 { batch = 12 }"),
}
"""Specs whose runs end otherwise, or change on the way."""
REFUSED = {
    "too few samples": apart().replace("batch = 4 samples", "batch = 52 samples"),
    "own batch": apart().replace(
        "batch = 4 samples",
        "batch = follow(9 samples * gradient_norm, min = 4 samples, max = 48 samples, step = 2 samples)",
    ),
}


def own_loop(text: str) -> dict[str, Any]:
    """Train as the run of a spec does, by `program.step` on the samples of this replica; return its weights."""
    launch = find_launch()
    assert launch is not None
    rank, size, points = launch.rank, launch.size, Points(SAMPLES, 1)
    with joined(launch, torch.device("cpu"), 60):
        program, order = trainc.compile(text), Order(SEED, SAMPLES)
        with find_hardware("cpu", "float32", None).products():
            for step in range(STEPS):
                seed_step(SEED, step, 0)
                program.begin()
                batch = program.batch_size
                first = program.clock.samples * size + rank * batch
                ids = split_indices(order.indices(first, batch), program.micro_size)
                seed_step(SEED, step, 1, rank)
                program.step([points.batch(some) for some in ids])
        return {"model": program.module.state_dict(), "signals": dict(program.signals)}


def spoil(rank: int) -> None:
    """Let `lr trust_ratio` make a gradient of rank 1 infinite in the fourth step, after the replicas have met in it."""
    change = ScaleGradients.change

    def spoiled(self: Any, gradients: Sequence[ParameterGradient], step: Step) -> None:
        change(self, gradients, step)
        if rank == 1 and step.clock.steps == 3:
            gradients[0].gradient.view(-1)[0] = math.inf

    ScaleGradients.change = spoiled  # type: ignore[method-assign]


def refused(text: str, out: Path, **options: Any) -> str:
    """Return the error of a run."""
    try:
        train(text, out, quiet=True, **options)
    except SpecError as error:
        return str(error)
    return "no error"


def kept_groups() -> list[str]:
    """Return the functions of torch whose default argument is a process group, which lives as long as they do."""
    from torch.distributed.nn import functional

    functions = inspect.getmembers(functional, inspect.isfunction)
    return [
        name
        for name, one in functions
        if any(isinstance(d, dist.ProcessGroup) for d in one.__defaults__ or ())
    ]


def main(folder: Path) -> None:
    launch = find_launch()
    assert launch is not None
    rank, found = launch.rank, dict[str, Any]()
    same = CASES if launch.size == 2 else GROUPS
    for name, text in same.items():
        train(text, folder / name, quiet=True)
        found[name] = own_loop(text)
        out = folder / f"{name} resumed"
        if rank == 0:  # the others wait for it in the run
            cut(folder / name, out)
        train(text, out, resume=True, quiet=True)
    if launch.size == 2:
        spoil(rank)
        for name, text in (READ | ENDED).items():
            summary = train(text, folder / name, quiet=True)
            found[name] = summary.reason, summary.message, summary.steps, summary.exit_code
        found |= {name: refused(text, folder / name) for name, text in REFUSED.items()}
    else:
        out = folder / "of two"
        found["of two"] = refused(CASES["average"], out, resume=True)
        found["accepted"] = refused(CASES["average"], out, resume=True, accept=True)
    found["kept"] = kept_groups()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
