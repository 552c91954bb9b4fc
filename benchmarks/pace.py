"""What PACE costs: the plain step, the pair as it is published, and ours, of one vision transformer on one thread.

`benchmarks/run.py pace` keeps the figures; `python -m benchmarks.pace --small` prints those of the smallest sizes.
Time is processor time, of steps in turn. Memory is the peak of a process that trains, beyond what it held before its
model was made, and the part of it that is not held between steps.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from benchmarks import ROOT
from benchmarks.measure import Json, Times, compared_over, in_processes, in_turn, seconds, timed
from examples.models import vit

GOALS = {"ours": 1.95, "ours, upper half": 1.6, "history": 1.1, "lazy": 1.1}
EXPECTED = "time and memory to plain at most: " + ", ".join(
    f"{name} {goal}" for name, goal in GOALS.items()
)
MIB = 2**20
SPEC = """train 1
run { length = 100k steps }
loss cross_entropy
optimizer adamw { lr = 1e-4, weight_decay = 0.01 }
"""
SIGMA = "1.2 * min(block, 1) * (blocks - block) / (blocks - 1)"
PACE = "regularize pace on type(Linear) { sigma = %s, weight = 0.5%s }\n"
"""The published schedule: no noise in block 0, and less with depth down to the head."""
UPPER = "min(max(2 * block - blocks + 1, 0), 1) * "
"""0 in the lower half of the blocks, 1 in the upper half and the head."""
CLAUSES = {
    "ours": PACE % (SIGMA, ""),
    "ours, upper half": PACE % (UPPER + SIGMA, ""),
    "history": PACE % (SIGMA, ", mode = history"),
    "lazy": PACE % (SIGMA, ", mode = lazy(10)"),
}
PERIOD = 10
"""The steps over which a time is taken where only one in so many has two views."""
PLAIN, PUBLISHED = "plain", "published pair"
VERSIONS = (PLAIN, PUBLISHED, *CLAUSES)
KEEP = {
    "MALLOC_TOP_PAD_": str(1 << 29),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 29),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
"""Settings of glibc by which a process keeps the memory that it frees."""


@dataclass(frozen=True, slots=True)
class Size:
    """A vision transformer, and a batch of square images."""

    layers: int = 12
    width: int = 192
    heads: int = 3
    image: int = 32
    samples: int = 16
    classes: int = 100
    rounds: int = 5
    processes: int = 2


SMALL = Size(2, 16, 2, image=8, samples=4, classes=10, rounds=2, processes=1)


def model(size: Size) -> nn.Module:
    """Build the same model each time."""
    torch.manual_seed(0)
    return vit(
        size.image, 4, 3, size.classes, layers=size.layers, width=size.width, heads=size.heads
    )


def images(size: Size) -> tuple[Tensor, Tensor]:
    """Return the same batch each time."""
    source = torch.Generator().manual_seed(1)
    shape = (size.samples, 3, size.image, size.image)
    classes = torch.randint(size.classes, (size.samples,), generator=source)
    return torch.randn(shape, generator=source), classes


class ByHand:
    """The loop anybody writes; with `paired` on the batch twice, with noise from forward hooks as it is published."""

    def __init__(self, size: Size, *, paired: bool) -> None:
        self.model, self.paired = model(size), paired
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)
        for name, module in self.model.named_modules() if paired else ():
            if isinstance(module, nn.Linear):
                block = size.layers if name == "head" else int(name.split(".")[1])
                sigma = 1.2 * min(block, 1) * (size.layers + 1 - block) / size.layers
                module.register_forward_hook(_noisy(sigma))

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Train on one batch."""
        inputs, targets = batch
        if self.paired:
            one, two = self.model(torch.cat([inputs, inputs])).chunk(2)
            loss = cross_entropy(one, targets) + 0.5 * (one - two).square().sum(-1).mean()
        else:
            loss = cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _noisy(sigma: float) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor | None:
        if sigma == 0:
            return None
        with torch.no_grad():
            shape = [len(y), *[1] * (y.dim() - 2), y.shape[-1]]
            z = torch.randn(shape) * sigma + 1
        return y * z

    return hook


def step_of(name: str, size: Size) -> Callable[[], object]:
    """Return a function that trains on one batch."""
    batch = images(size)
    if name in (PLAIN, PUBLISHED):
        hand = ByHand(size, paired=name == PUBLISHED)
        return lambda: hand.step(batch)
    program = trainc.compile(SPEC + CLAUSES[name], model(size), executor="graph")
    ids = torch.arange(size.samples) if program.reads_sample_ids else None
    return lambda: program.step(batch, sample_ids=ids)


def measure(size: Size = Size()) -> Json:
    """Measure every version, in processes that keep the memory they once had: to get it anew costs as much as noise."""
    before = {name: os.environ.get(name) for name in KEEP}
    os.environ |= KEEP
    try:
        found = in_processes("benchmarks.pace:times", size.processes, size=asdict(size))
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}
    rows: Json = {
        name: {"seconds": seconds([t for one in found for t in one[name]])} for name in VERSIONS
    }
    for name in VERSIONS[1:]:
        rows[name]["time to plain"] = compared_over(found, name, PLAIN)
    _add_memory(rows, size)
    return {
        "expected": EXPECTED,
        "met": {name: _meets(rows[name], goal) for name, goal in GOALS.items()},
        "measured": {"size": asdict(size), "versions": rows},
    }


def times(size: Json) -> dict[str, list[Times]]:
    """Time the steps of every version in turn, of `lazy` ten at once."""
    torch.set_num_threads(1)
    wanted = Size(**size)
    turns = {
        name: _turn(step_of(name, wanted), PERIOD if name == "lazy" else 1) for name in VERSIONS
    }
    return in_turn(turns, wanted.rounds, warm_up=2)


def _turn(step: Callable[[], object], count: int) -> Callable[[], Times]:
    def every() -> None:
        for _ in range(count):
            step()

    def turn() -> Times:
        found = timed(every)
        return Times(found.wall / count, found.cpu / count)

    return turn


def _meets(row: Json, goal: float) -> bool:
    return bool(
        max(row["time to plain"]["cpu"]["median"], *row["memory to plain"].values()) <= goal
    )


def _add_memory(rows: Json, size: Size) -> None:
    """Add the memory of each version, in MiB and to that of the plain step."""
    small = ["--small"] if size == SMALL else []
    for name, row in rows.items():
        row["memory, MiB"] = _memory_in_process(name, small)
        plain = rows[PLAIN]["memory, MiB"]
        if name != PLAIN:
            row["memory to plain"] = {
                part: round(value / plain[part], 3) for part, value in row["memory, MiB"].items()
            }


def _memory_in_process(name: str, options: list[str]) -> Json:
    """Return the memory of a version, in a process whose large blocks of memory go back when they are freed."""
    command = [sys.executable, "-m", "benchmarks.pace", "--memory", name, *options]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: Json = json.loads(ran.stdout.splitlines()[-1])
    return found


def memory(name: str, size: Size) -> Json:
    """Return in MiB the peak of later steps, beyond what was held before the model, and between steps."""
    torch.set_num_threads(1)
    before = _status("VmRSS")
    step = step_of(name, size)
    count = PERIOD if name == "lazy" else 2
    for _ in range(count):
        step()
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(count):
        step()
    peak = _status("VmHWM")
    return {"whole": round((peak - before) / MIB, 1), "of a step": round((peak - held) / MIB, 1)}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {name}")


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the smallest sizes, in seconds")
    parser.add_argument("--memory", metavar="VERSION", help="the memory of one version, in MiB")
    options = parser.parse_args()
    size = SMALL if options.small else Size()
    found = memory(options.memory, size) if options.memory else measure(size)
    print(json.dumps(found, indent=None if options.memory else 1))


if __name__ == "__main__":
    main()
