"""Rows that time one operator: forward and backward by themselves, beside what it has to beat.

Inputs take turns so that they exceed the cache together. Every version says how it was run: in a graph of many calls,
or eagerly, where host time may hide the device's. Alternatives do not work out per-example norms, but for `by hand`,
which adds them to ATen's gradients, and `one graph`: everything that backward makes, norms too, in one function that
inductor compiles.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Cuda, Work, check
from benchmarks.measure import Json
from benchmarks.on_gpu.record import Row
from benchmarks.operators import Forward, Problem, Size, outputs

Build = Callable[[Size, torch.dtype, str], Problem]
VERSIONS = ("ours", "one graph", "inductor", "aten", "by hand", "liger")
FEWER = ("ours", "aten")
"""Where compilers take long and nothing was promised about them."""
# Checking needs some ten float64 copies.
LARGEST_CHECK = 1 << 27
SETS = 16


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


def label(name: str, size: Size, dtype: torch.dtype) -> str:
    """Name a row."""
    return f"{name} {'x'.join(str(one) for one in asdict(size).values())} {str(dtype)[6:]}"


def timed(
    name: str,
    build: Build,
    size: Size,
    dtype: torch.dtype,
    versions: Sequence[str],
    seconds: float,
    backend: str,
) -> Row:
    """Return the row of an operator at one size."""

    def run(device: Cuda, until: float) -> Json:
        return measure(device, build, size, dtype, versions, until, backend)

    return Row("operators", label(name, size, dtype), seconds, run)


def measure(
    device: Cuda,
    build: Build,
    size: Size,
    dtype: torch.dtype,
    versions: Sequence[str],
    until: float,
    backend: str,
) -> Json:
    """Check and time one operator; what the clock leaves no time for is said."""
    problem = build(size, dtype, device.kind)
    found: Json = {"bytes": dict(zip(("forward", "backward"), problem.moved, strict=True))}
    small = _smaller(size)
    found["checked at"] = list(asdict(small).values())
    found |= check(problem if small == size else build(small, dtype, device.kind), dtype)
    device.clear()
    sets = _sets(device, problem, build, size, dtype)
    works = [_both(one) for one in sets[:2]]
    try:
        found["kernels"] = device.kernels(works)
    except RuntimeError as error:  # times do without the profiler
        found |= {"kernels": {}, "profiler": f"{type(error).__name__}: {error}"[:200]}
    del works
    times: Json = {}
    found["times"] = times
    for version in versions:
        if time.monotonic() > until and times:
            times[version] = {"left out": "for want of time"}
            continue
        try:
            one = _phases(device, sets, version, backend)
        except Exception as error:  # an alternative that fails is a result
            if version == "ours":
                raise
            one = {"failed": f"{type(error).__name__}: {error}"[:200]}
        if one is not None:
            times[version] = one
        device.clear()
    return found


def _smaller(size: Size) -> Size:
    """The size, or one that is like it and can be checked."""
    while math.prod(asdict(size).values()) > LARGEST_CHECK:
        size = Size(max(1, size.examples // 2), size.rows, size.width)
        if size.examples == 1:
            size = Size(1, size.rows // 2, size.width)
    return size


def _sets(
    device: Cuda, problem: Problem, build: Build, size: Size, dtype: torch.dtype
) -> list[Problem]:
    """Problems whose inputs together are four times what a cache holds, with the gradients of their results."""
    held = sum(a.nbytes for a in problem.arguments if isinstance(a, Tensor))
    count = min(SETS, max(2, math.ceil(4 * device.cache() / max(held, 1))))
    sets = [problem, *(build(size, dtype, device.kind) for _ in range(count - 1))]
    for one in sets:  # drawn outside what is captured
        _ends(one, outputs(one.ours, one.arguments))
    return sets


def _ends(problem: Problem, results: Sequence[Tensor]) -> list[Tensor]:
    """The results that receive gradients, which are drawn once."""
    ends = [one for one in results if one.requires_grad]
    if not problem.cotangents:
        problem.cotangents = [torch.randn_like(one) for one in ends]
    return ends


def _both(problem: Problem) -> Work:
    """Ours, forward and backward."""
    leaves = problem.leaves()

    def work() -> object:
        found = outputs(problem.ours, problem.arguments)
        return found if not leaves else _gradients(_ends(problem, found), problem, keep=False)

    return work


def _gradients(ends: list[Tensor], problem: Problem, keep: bool = True) -> tuple[Any, ...]:
    return torch.autograd.grad(
        ends, problem.leaves(), problem.cotangents, retain_graph=keep, allow_unused=True
    )


def _phases(device: Cuda, sets: list[Problem], version: str, backend: str) -> Json | None:
    """Time a version's forward and backward; None where the operator has no such version."""
    one = sets[0]
    if version == "one graph":
        return None if one.rival is None else {"backward": device.timed(_rivals(sets, backend))}
    others = liger()
    if (version == "by hand" and one.statistics is None) or (
        version == "liger" and one.liger not in others
    ):
        return None
    torch._dynamo.reset()
    compiled: Forward | None = None
    if version == "inductor":
        # Backward runs again and again on the same forward pass: its memory is not to be given away.
        with torch._functorch.config.patch(donated_buffer=False):
            compiled = torch.compile(one.aten, dynamic=False, backend=backend)
            _gradients_of(sets, compiled)
    forwards: list[Forward] = [
        {"ours": each.ours, "inductor": compiled or each.aten, "liger": others.get(each.liger or "", each.aten)}
        .get(version, each.aten)
        for each in sets
    ]  # fmt: skip
    found: Json = {}
    if version != "by hand":
        works: list[Work] = [
            lambda each=each, forward=forward: outputs(forward, each.arguments)  # type: ignore[misc]
            for each, forward in zip(sets, forwards, strict=True)
        ]
        found["forward"] = device.timed(works)
    if one.leaves():
        found["backward"] = device.timed(_backwards(sets, forwards, version == "by hand"))
    return found


def _gradients_of(sets: list[Problem], forward: Forward) -> None:
    """Compile a forward pass and its backward."""
    ends = _ends(sets[0], outputs(forward, sets[0].arguments))
    if sets[0].leaves():
        _gradients(ends, sets[0])


def _backwards(sets: list[Problem], forwards: list[Forward], by_hand: bool) -> list[Work]:
    """Backward passes of forward passes that are kept."""

    def work(problem: Problem, ends: list[Tensor]) -> Work:
        def run() -> object:
            found = _gradients(ends, problem)
            if not by_hand or problem.statistics is None:
                return found
            with torch.no_grad():
                return found, problem.statistics(problem.arguments, problem.cotangents)

        return run

    return [
        work(one, _ends(one, outputs(forward, one.arguments)))
        for one, forward in zip(sets, forwards, strict=True)
    ]


def _rivals(sets: list[Problem], backend: str) -> list[Work]:
    """All that backward makes as one compiled function."""
    torch._dynamo.reset()
    given = [one.rival(one.arguments, one.cotangents) for one in sets if one.rival is not None]
    compiled = torch.compile(given[0][0], dynamic=False, fullgraph=True, backend=backend)
    return [lambda each=each: compiled(*each) for _, each in given]  # type: ignore[misc]
