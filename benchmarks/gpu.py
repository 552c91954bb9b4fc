"""Operators and whole steps on a GPU: `python benchmarks/gpu.py`, under 8 minutes for each of these two parts.

It needs a checkout, torch, triton and numpy, and no install; whole steps need lark, pydantic and safetensors as well,
and are left out where these are missing. The most telling case of every operator comes first.

Operators stand beside ATen, inductor and Liger, whole steps beside plain `torch.compile` (whole_steps.py). Each
operator is first compared with float64 on fresh random inputs and poisoned memory, then timed: medians over input sets
that together exceed the cache, replayed from graphs where that works. Backward is forward-and-backward less forward.
Alternatives do not work out per-example norms; the composition that does is `by hand`. Rates are fractions of the
device's measured copy rate.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

# Started as a file, Python looks for imports beside the file; ours start at the checkout.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import accuracy, updates, whole_steps
from benchmarks.device import Cuda, DryRun, Work, check, copy_rate, spread
from benchmarks.measure import Json
from benchmarks.operators import (
    Forward,
    Problem,
    Size,
    batch_norm,
    embedding,
    head,
    linear,
    loss,
    noisy,
    norm,
    outputs,
    step,
)

Build = Callable[[Size, torch.dtype, str], Problem]
BF16, FP32 = torch.bfloat16, torch.float32
PARTS = ("operators", "steps")
COPY = 1 << 30
# Checking needs some ten float64 copies.
LARGEST_CHECK = 1 << 27
NORMS: tuple[tuple[Size, torch.dtype], ...] = (
    (Size(64, 1024, 4096), BF16), (Size(8, 2048, 4096), BF16), (Size(8, 2048, 1024), BF16),
    (Size(8, 2048, 8192), BF16), (Size(8, 2048, 4096), FP32), (Size(64, 1024, 1024), BF16),
    (Size(1, 16384, 2048), BF16), (Size(8, 512, 768), BF16), (Size(16384, 1, 1024), BF16),
    (Size(8, 2048, 16384), BF16),
)  # fmt: skip
FEW = ((Size(64, 1024, 4096), BF16), (Size(8, 2048, 4096), BF16))
# By the launch rule: products of rows, twice; the fused gradient; ATen's examples, in float32.
LINEAR = (
    (Size(8, 1024, 4096), BF16), (Size(64, 128, 4096), BF16), (Size(64, 512, 768), BF16),
    (Size(8, 2048, 1024), FP32),
)  # fmt: skip
FULL = tuple(
    (Size(examples, tokens // examples, width), dtype)
    for width, tokens, examples, dtype in product(
        (768, 1024, 2048, 4096, 8192), (4096, 16384, 65536), (1, 8, 64), (BF16, FP32)
    )
)
CASES: tuple[tuple[str, Build, tuple[tuple[Size, torch.dtype], ...], bool], ...] = (
    ("layer_norm, probe", norm(rms=False, add=False, probed=True), NORMS, True),
    ("rms_norm, probe", norm(rms=True, add=False, probed=True), NORMS, True),
    ("noisy_add, token", noisy(add=True, share="token"), FEW, False),
    ("noisy_add, none", noisy(add=True, share="none"), FEW[1:], False),
    ("multiplicative_noise, token", noisy(add=False, share="token"), FEW, False),
    ("cross_entropy_consistency, mse", loss("mse"), ((Size(1, 4096, 32768), BF16),), False),
    ("cross_entropy_consistency, kl", loss("kl"), ((Size(1, 4096, 32768), BF16),), False),
    ("linear_cross_entropy_consistency, mse", head("mse", 4096), ((Size(1, 4096, 32768), BF16),), False),
    ("linear_cross_entropy_consistency, kl", head("kl", 4096), ((Size(1, 4096, 32768), BF16),), False),
    ("sparse_adamw_", updates.sparse_adamw, ((Size(1, 65536, 8192), BF16),), False),
    ("multi_norm", updates.multi_norm, ((Size(150, 4096, 1024), BF16),), False),
    ("masked_update_", updates.masked_update, ((Size(1, 32768, 4096), BF16),), False),
    ("add_layer_norm, probe", norm(rms=False, add=True, probed=True), FEW, True),
    ("add_rms_norm, probe", norm(rms=True, add=True, probed=True), FEW, True),
    ("rms_norm", norm(rms=True, add=False, probed=False), FEW, True),
    ("linear, probe", linear, LINEAR, False),
    ("embedding, probe", embedding, ((Size(8, 2048, 4096), BF16), (Size(64, 512, 768), FP32)), False),
    ("ghost_batch_norm", batch_norm,
     ((Size(256, 3136, 64), FP32), (Size(256, 3136, 64), BF16), (Size(256, 49, 512), BF16)), False),
)  # fmt: skip
VERSIONS = ("ours", "aten", "inductor", "liger", "by hand")
TINY = ((Size(2, 3, 24), FP32), (Size(8, 1, 40), BF16))


def liger() -> dict[str, Forward]:
    """Liger's kernels by our names; empty where it is not installed."""
    try:
        layer = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        rms = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    except ImportError:
        return {}
    return {
        "layer_norm": lambda x, w, b, *_: layer.apply(x, w, b, 1e-5),
        "rms_norm": lambda x, w, *_: rms.apply(x, w, 1e-5),
    }


def contenders(problem: Problem, backend: str) -> dict[str, tuple[Forward, bool]]:
    """What is timed: how to compute, and whether per-example norms follow by hand."""
    torch._dynamo.reset()
    found: dict[str, tuple[Forward, bool]] = {
        "ours": (problem.ours, False),
        "aten": (problem.aten, False),
        "inductor": (torch.compile(problem.aten, dynamic=False, backend=backend), False),
    }
    if problem.statistics is not None:
        found["by hand"] = (problem.aten, True)
    if problem.liger in (others := liger()):
        found["liger"] = (others[problem.liger], False)
    return found


def measured(device: Cuda, sets: list[Problem], forward: Forward, by_hand: bool) -> Json:
    """Time forward, and forward with backward, over the input sets."""
    found: Json = {}

    def ahead(one: Problem) -> Work:
        return lambda: outputs(forward, one.arguments)

    def both(one: Problem) -> Work:
        return lambda: step(one, forward, by_hand)

    phases = {"forward": ahead} | ({"both": both} if sets[0].leaves() else {})
    for phase, make in phases.items():
        works, how = zip(*(device.captured(make(one)) for one in sets), strict=True)
        found[phase] = {**spread(device.times(works)), "how": how[0]}
        del works
        device.clear()
    if "both" in found:
        less = found["both"]["median"] - found["forward"]["median"]
        found["backward"] = {"median": round(less, 2)}
    return found


def row(
    device: Cuda, name: str, build: Build, size: Size, dtype: torch.dtype, backend: str
) -> Json:
    """Check and time one case."""
    found: Json = {"operator": name, "size": list(asdict(size).values()), "dtype": str(dtype)[6:]}
    problem = build(size, dtype, device.kind)
    found["bytes"] = dict(zip(("forward", "backward"), problem.moved, strict=True))
    small = size
    while math.prod(asdict(small).values()) > LARGEST_CHECK:
        small = Size(max(1, small.examples // 2), small.rows, small.width)
        if small.examples == 1:
            small = Size(1, small.rows // 2, small.width)
    found["checked at"] = list(asdict(small).values())
    found |= check(problem if small == size else build(small, dtype, device.kind), dtype)
    device.clear()
    # Inputs alone must not fit the cache, or repeated runs would measure it.
    held = sum(a.nbytes for a in problem.arguments if isinstance(a, torch.Tensor))
    count = min(16, max(2, math.ceil(4 * device.cache() / max(held, 1))))
    sets = [problem, *(build(size, dtype, device.kind) for _ in range(count - 1))]
    for one in sets:  # gradients of results are drawn outside what is captured
        step(one, one.ours)
    found["times"] = {}
    for version, (forward, by_hand) in contenders(problem, backend).items():
        try:
            found["times"][version] = measured(device, sets, forward, by_hand)
        except Exception as error:  # an alternative that fails is a result
            if version == "ours":
                raise
            found["times"][version] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    del sets, problem
    device.clear()
    return found


def total(times: Json) -> float:
    """Microseconds forward and, where there is one, backward; nan for what failed."""
    phase = times.get("both") or times.get("forward") or {"median": math.nan}
    return float(phase["median"])


def line(found: Json, rate: float) -> str:
    """One row of the table."""
    size = "x".join(map(str, found["size"]))
    parts = [f"{found['operator']:38}{size:>16} {found['dtype']:9}"]
    parts += [f"{total(found['times'].get(version, {})):9.1f}" for version in VERSIONS]
    parts.append(f"{sum(found['bytes'].values()) / 1e6:9.1f}")
    ours = found["times"]["ours"]
    for phase in ("forward", "backward"):
        spent = ours.get(phase, {}).get("median", 0) / 1e6
        part = found["bytes"][phase] / spent / rate if spent > 0 else math.nan
        parts.append(f"{part:6.2f}")
    verdict = "ok" if found["passed"] else "WRONG"
    parts.append(f"{found['error']:9.1e} {verdict}{'' if found['repeatable'] else ' VARIES'}")
    return " ".join(parts)


def run(device: Cuda, only: list[str], full: bool, budget: float, backend: str) -> Json:
    """Measure the cases in order until the seconds are spent."""
    begin, dry = time.monotonic(), isinstance(device, DryRun)
    head = " ".join(f"{name:>9}" for name in VERSIONS)
    print(
        f"{'operator':38}{'size':>16} {'dtype':9} {head} {'MB':>9} {'fwd':>6} {'bwd':>6}     error"
    )
    rate = copy_rate(device, 1 << 16 if dry else COPY)
    # Time may run out: every operator's first size comes before any operator's second.
    cases = sorted(
        (
            (rank, name, build, size, dtype)
            for name, build, sizes, is_norm in CASES
            if not only or name.startswith(tuple(only))
            for rank, (size, dtype) in enumerate(
                TINY[: 1 + is_norm] if dry else FULL if full and is_norm else sizes
            )
        ),
        key=itemgetter(0),
    )
    rows, left, failed = [], [], []
    for _, name, build, size, dtype in cases:
        if time.monotonic() - begin > budget:
            left.append([name, list(asdict(size).values()), str(dtype)[6:]])
            continue
        torch.manual_seed(time.time_ns() % (1 << 31))  # fresh inputs, every run
        try:
            rows.append(row(device, name, build, size, dtype, backend))
            print(line(rows[-1], rate), flush=True)
        except Exception as error:  # one operator's failure leaves the others to measure
            failed.append([name, list(asdict(size).values()), str(dtype)[6:], repr(error)[:500]])
            print(f"{name} {size} {dtype} FAILED: {error!r}", flush=True)
    print(f"{device.name()}: copy {rate / 1e12:.3f} TB/s; times in us; fractions of the copy rate")
    if left:
        print(f"left out for want of time: {len(left)}")
    return {
        "copy TB/s": round(rate / 1e12, 3),
        "unit": "microseconds",
        "rows": rows,
        "left out": left,
        "failed": failed,
    }


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when every result was right, 1 when one was not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="what names of operators and of steps' cases start with",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--full", action="store_true", help="norms at every size")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (all)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=whole_steps.SHAPES,
        default=[*whole_steps.SHAPES],
        help="of whole steps (all)",
    )
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the parameters in whole steps: those of float32 compute in bf16 by autocast (%(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        help="start no case of a part after this (%(default)s)",
    )
    parser.add_argument("--accuracy", action="store_true", help="errors on hard inputs as well")
    parser.add_argument("--dry-run", action="store_true", help="try the script on a CPU")
    options: Any = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device: nothing was measured.", file=sys.stderr)
        return 2
    device = DryRun() if options.dry_run else Cuda()
    backend = "aot_eager" if options.dry_run else "inductor"
    versions = ", ".join(f"{name} {version}" for name, version in device.versions().items())
    print(f"{device.name()}; {versions}", flush=True)
    found: Json = {
        "device": device.name(),
        "taken": datetime.now(UTC).date().isoformat(),
        "versions": device.versions(),
    }
    right = True
    if "operators" in options.parts:
        found |= run(device, options.only, options.full, options.seconds, backend)
        right = not found["failed"] and all(one["passed"] for one in found["rows"])
    if "steps" in options.parts:
        found["steps"] = steps(device, options, backend)
        rows = found["steps"].get("rows", [])
        right &= all(one["passed"] and "failed" not in one for one in rows)
    if options.accuracy:  # after what is timed: it compiles every kernel for other shapes
        found["accuracy"] = accuracy.run(options.only, draws=1, device=device.kind)
        for name, families in accuracy.worst(found["accuracy"]).items():
            print(f"{name:38} " + "  ".join(f"{k} {v:.2g}" for k, v in families.items()))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if right else 1


def steps(device: Cuda, options: Any, backend: str) -> Json:
    """Measure whole steps, or say why not."""
    weights = getattr(torch, options.weights)
    autocast = BF16 if weights is FP32 else None
    way = whole_steps.Way(device.kind, weights, autocast, backend)
    print(whole_steps.heading(), flush=True)
    found = whole_steps.measure(device, way, options.models, options.only, options.seconds)
    if "not measured" in found:
        print(f"not measured: {found['not measured']}")
    if found.get("left out"):
        print(f"left out for want of time: {len(found['left out'])}")
    return found


if __name__ == "__main__":
    sys.exit(main())
