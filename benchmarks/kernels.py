"""Operators on the CPU beside the ATen compositions they replace and inductor: `-m benchmarks.kernels`.

All take turns in one process on one thread. Ratios are ours to theirs: below 1 ours is faster. With
a probe both work out per-example norms; `plain` is the same layer without them.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, layers, updates
from benchmarks.measure import Json, Times, compared, in_turn, load, machine, seconds, timed
from benchmarks.operators import (
    Problem,
    Size,
    batch_norm,
    embedding,
    head,
    linear,
    loss,
    noisy,
    norm,
    step,
)
from trainc.kernels.layer import linear as linear_operator
from trainc.kernels.loss import cross_entropy_consistency
from trainc.kernels.norm import layer_norm, rms_norm
from trainc.kernels.parameter import multi_norm

RESULTS = ROOT / "benchmarks/results/kernels_cpu.json"
EXPECTED = "our CPU paths cost at most what the ATen composition costs: ratio at most 1"
# A ratio counts as missed when the lower end of its median's 95% interval is above this.
NOISE = 1.02
SMALL, MIDDLE, LARGE = Size(4, 16, 64), Size(8, 128, 256), Size(8, 128, 768)
WIDE = Size(16, 256, 768)
Build = Callable[[Size, torch.dtype, str], Problem]
NORMS = (SMALL, MIDDLE, LARGE, WIDE)
IMAGES = (Size(64, 49, 64), Size(64, 196, 64))
CASES: dict[str, tuple[Build, tuple[Size, ...]]] = {
    "layer_norm": (norm(rms=False, add=False, probed=False), NORMS),
    "layer_norm, probe": (norm(rms=False, add=False, probed=True), NORMS),
    "rms_norm": (norm(rms=True, add=False, probed=False), NORMS),
    "rms_norm, probe": (norm(rms=True, add=False, probed=True), NORMS),
    "add_layer_norm": (norm(rms=False, add=True, probed=False), (MIDDLE, LARGE)),
    "add_layer_norm, probe": (norm(rms=False, add=True, probed=True), (MIDDLE, LARGE)),
    "add_rms_norm": (norm(rms=True, add=True, probed=False), (MIDDLE, LARGE)),
    "add_rms_norm, probe": (norm(rms=True, add=True, probed=True), (MIDDLE, LARGE)),
    "multiplicative_noise, token": (noisy(add=False, share="token"), (Size(16, 128, 192), LARGE)),
    "multiplicative_noise, none": (noisy(add=False, share="none"), (Size(16, 128, 192),)),
    "noisy_add, token": (noisy(add=True, share="token"), (Size(16, 128, 192), LARGE)),
    "noisy_add, none": (noisy(add=True, share="none"), (Size(16, 128, 192),)),
    "cross_entropy_consistency, mse": (loss("mse"), (Size(1, 256, 1000), Size(1, 1024, 5000))),
    "cross_entropy_consistency, kl": (loss("kl"), (Size(1, 256, 1000), Size(1, 1024, 5000))),
    "linear_cross_entropy_consistency, mse": (
        head("mse", 256),
        (Size(1, 512, 8192), Size(1, 512, 32000)),
    ),
    "linear_cross_entropy_consistency, kl": (
        head("kl", 256),
        (Size(1, 512, 8192), Size(1, 512, 32000)),
    ),
    "linear, probe": (linear, (MIDDLE, Size(8, 16, 256))),
    "embedding, probe": (embedding, (MIDDLE,)),
    "ghost_batch_norm": (batch_norm, IMAGES),
    "multi_norm": (updates.multi_norm, (Size(120, 32, 256), Size(12, 1024, 768))),
    "sparse_adamw_": (updates.sparse_adamw, (Size(1, 1024, 1024), Size(1, 4096, 4096))),
    "masked_update_": (updates.masked_update, (Size(1, 1024, 1024),)),
    **layers.CASES,
}


def measure(names: tuple[str, ...] = (), spent: float = 0.4, inductor: bool = True) -> Json:
    """Measure every case whose name starts with one of `names`, and dispatch."""
    torch.set_num_threads(1)
    why = "" if shutil.which("c++") or shutil.which("g++") else "no C++ compiler"
    why = why or ("" if inductor else "not asked for")
    found = []
    for name, (build, sizes) in CASES.items():
        if names and not name.startswith(names):
            continue
        for size in sizes:
            row = _measure(name, build, size, spent, "" if size is sizes[-1] and not why else why)
            found.append(row)
            print(line(row), flush=True)
    missed = [
        f"{row['operator']} {row['size']}"
        for row in found
        if row["ratio"]["aten"]["interval"][0] > NOISE
    ]
    return {
        "expected": EXPECTED,
        "met": not missed,
        "measured": {"cases": found, "missed": missed, "dispatch": dispatch(spent)},
    }


def _measure(name: str, build: Build, size: Size, spent: float, no_inductor: str) -> Json:
    torch.manual_seed(0)
    problem = build(size, torch.float32, "cpu")
    versions: dict[str, Callable[[], object]] = {
        "ours": lambda: step(problem, problem.ours),
        "aten": lambda: step(problem, problem.aten, by_hand=True),
    }
    if problem.statistics is not None:
        versions["plain"] = lambda: step(problem, problem.aten)
    if not no_inductor and size is CASES[name][1][-1]:
        try:
            torch._dynamo.reset()
            compiled = torch.compile(problem.aten, dynamic=False)
            step(problem, compiled)
            versions["inductor"] = lambda: step(problem, compiled, by_hand=True)
        except Exception as error:  # whatever a compiler fails with is a reason to go on without
            no_inductor = f"{type(error).__name__}"
    times = _in_turn(versions, spent)
    ratio = {
        other: compared(times["ours"], found)["cpu"]
        for other, found in times.items()
        if other != "ours"
    }
    return {
        "operator": name,
        "size": str(tuple(asdict(size).values())),
        "bytes": sum(problem.moved),
        "ratio": ratio,
        "inductor": no_inductor or ("measured" if "inductor" in times else "largest size only"),
        "seconds": {version: seconds(found)["cpu"] for version, found in times.items()},
    }


def _in_turn(versions: Mapping[str, Callable[[], object]], spent: float) -> dict[str, list[Times]]:
    """Time versions in turn, several calls at a time where a call is short."""
    for work in versions.values():
        work()
    single = max(timed(work).wall for work in versions.values())
    repeats = max(1, math.ceil(5e-4 / single))
    rounds = min(200, max(15, int(spent / (single * repeats))))

    def several(work: Callable[[], object]) -> Times:
        total = timed(lambda: [work() for _ in range(repeats)])
        return Times(total.wall / repeats, total.cpu / repeats)

    return in_turn({name: partial(several, work) for name, work in versions.items()}, rounds)


def dispatch(spent: float) -> list[Json]:
    """Time what an operator costs beyond the function it runs, on tensors of next to no size."""
    x, weight, half = torch.randn(2, 2, 8), torch.ones(8), torch.tensor(0.5)
    pairs: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
        "layer_norm": (
            torch.ops.trainc.layer_norm, layer_norm.eager_forward,
            (x, [8], weight, None, None, 1e-5),
        ),
        "rms_norm": (
            torch.ops.trainc.rms_norm, rms_norm.eager_forward, (x, [8], weight, None, 1e-5, "none"),
        ),
        "linear": (
            torch.ops.trainc.linear, linear_operator.eager_forward,
            (x, torch.ones(4, 8), None, torch.zeros(2, 1), "auto"),
        ),
        "multi_norm": (torch.ops.trainc.multi_norm, multi_norm.eager, ([x, x], [])),
        "cross_entropy_consistency": (
            torch.ops.trainc.cross_entropy_consistency, cross_entropy_consistency.eager_forward,
            (x.flatten(1), torch.zeros(1, dtype=torch.long), half, "mse", -100, 0.0),
        ),
    }  # fmt: skip
    found = []
    for name, (operator, function, arguments) in pairs.items():
        versions = {
            "operator": partial(operator, *arguments),
            "function": partial(function, *arguments),
        }
        with torch.no_grad():
            times = _in_turn(versions, spent)
        both = {which: seconds(one)["cpu"]["median"] for which, one in times.items()}
        extra = (both["operator"] - both["function"]) * 1e6
        found.append({"operator": name, "microseconds": round(extra, 1), "seconds": both})
        print(f"dispatch of {name}: {extra:.0f} us", flush=True)
    return found


def line(row: Json) -> str:
    """One row of the table."""
    ratio = row["ratio"]
    parts = [
        f"{row['operator']:28} {row['size']:18} {row['seconds']['ours']['median'] * 1e3:9.3f} ms"
    ]
    for other in ("aten", "plain", "inductor"):
        if other in ratio:
            low, high = ratio[other]["quartiles"]
            parts.append(f"{other} {ratio[other]['median']:5.2f} [{low:.2f}, {high:.2f}]")
    return "  ".join([*parts, f"{row['bytes'] / 1e6:.1f} MB"])


def main() -> None:
    """Measure, print a line a case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names that cases start with")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.relative_to(ROOT)}, or none")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each version of a case")
    parser.add_argument("--no-inductor", action="store_true")
    options = parser.parse_args()
    before = load()
    found = measure(tuple(options.only), options.seconds, not options.no_inductor)
    result = {
        "benchmark": "kernels_cpu",
        "taken": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "clock": "processor time",
        "load average": {"before": before, "after": load()},
        **found,
    }
    out = options.out or (None if options.only else RESULTS)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"missed: {', '.join(found['measured']['missed']) or 'none'}")


if __name__ == "__main__":
    main()
