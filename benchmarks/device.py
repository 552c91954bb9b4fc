"""Timing and checking on a CUDA device, and a stand-in without one to try the scripts on."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks.measure import Json
from benchmarks.operators import Problem, step
from trainc.kernels.library.graph_capture import random_numbers_survive

WARM_UP = 3
# Relative to the norm of the exact result: sums in float32, results rounded once.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Work = Callable[[], object]


class Cuda:
    """The current CUDA device; work is captured in graphs and timed by events."""

    kind, rounds = "cuda", 30

    def name(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name()

    def cache(self) -> int:
        """Bytes of its last cache."""
        return int(torch.cuda.get_device_properties().L2_cache_size)

    def captured(self, work: Work) -> tuple[Work, str]:
        """The work as a graph's replay, or as it is where it cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with random_numbers_survive(), torch.cuda.graph(graph, stream=stream):
                kept = work()
        except RuntimeError:
            torch.cuda.synchronize()
            return work, "eager"
        # The results keep the graph's memory from being given to the next one.
        return (lambda kept=kept: graph.replay()), "graph"

    def times(self, works: Sequence[Work]) -> list[float]:
        """Seconds of each of `rounds` calls, going round the works."""
        for _ in range(WARM_UP):
            for work in works:
                work()
        pairs = []
        for number in range(max(self.rounds, 2 * len(works))):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            works[number % len(works)]()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def clear(self) -> None:
        """Give memory back between measurements."""
        gc.collect()
        torch.cuda.empty_cache()

    def versions(self) -> Json:
        """What was measured with."""
        import triton

        return {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        }


class DryRun(Cuda):
    """The same on a CPU: everything but graphs and events, at sizes that take no time."""

    kind, rounds = "cpu", 2

    def name(self) -> str:
        """Say that nothing was measured."""
        return "dry run"

    def cache(self) -> int:
        """Pretend to a small cache."""
        return 1 << 12

    def captured(self, work: Work) -> tuple[Work, str]:
        """Leave the work as it is."""
        return work, "eager"

    def times(self, works: Sequence[Work]) -> list[float]:
        """Seconds on the wall."""
        found = []
        for number in range(self.rounds):
            begin = time.perf_counter()
            works[number % len(works)]()
            found.append(time.perf_counter() - begin)
        return found

    def clear(self) -> None:
        """Nothing to give back."""

    def versions(self) -> Json:
        """Leave triton out: it need not be there."""
        return {"torch": torch.__version__}


def spread(times: Sequence[float]) -> Json:
    """Median and quartiles in microseconds."""
    low, _, high = quantiles(times, n=4)
    return {"median": _us(median(times)), "quartiles": [_us(low), _us(high)]}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def copy_rate(device: Cuda, size: int) -> float:
    """Bytes a second of a copy within the device, read and written."""
    pairs = [
        (torch.rand(size // 4, device=device.kind), torch.empty(size // 4, device=device.kind))
        for _ in range(2)
    ]
    works: list[Work] = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]  # type: ignore[misc]
    return 2 * size / median(device.times(works))


def clones(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The problem on copies of its tensors, in another dtype where one is given."""

    def copy(one: object) -> object:
        if not isinstance(one, Tensor):
            return one
        copied = one.detach().clone()
        copied = copied.to(dtype) if dtype and copied.is_floating_point() else copied
        return copied.requires_grad_(one.requires_grad)

    cotangents = [one.to(dtype) if dtype else one for one in problem.cotangents]
    return replace(problem, arguments=[copy(a) for a in problem.arguments], cotangents=cotangents)


def poison(likes: Sequence[Tensor | None]) -> None:
    """Leave memory of these sizes full of nan for the next allocations to find."""
    held = [
        torch.full_like(one, math.nan)
        for one in likes
        if one is not None and one.is_floating_point()
    ]
    del held


def check(problem: Problem, dtype: torch.dtype) -> Json:
    """Compare ours with float64 on poisoned memory, and with itself on the same input."""
    first = step(clones(problem), problem.ours)
    if not problem.cotangents:  # drawn by the first call on its clone
        drawn = [one for one in first if one is not None and one.requires_grad]
        problem.cotangents = [torch.randn_like(one) for one in drawn]
        first = step(clones(problem), problem.ours)
    poison(first)
    again = step(clones(problem), problem.ours)
    wide = clones(problem, torch.float64)
    exact = step(wide, problem.exact or problem.aten, by_hand=True)
    errors = [
        _error(mine, true)
        for mine, true in zip(again, exact, strict=True)
        if mine is not None and true is not None
    ]
    equal = all(
        a is None or b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True)
    )
    worst = max((math.inf if math.isnan(error) else error for error in errors), default=math.inf)
    return {"error": worst, "passed": worst <= TOLERANCE[dtype], "repeatable": equal}


def _error(mine: Tensor, exact: Tensor) -> float:
    mine, exact = mine.detach().double(), exact.detach().double()
    if mine.shape != exact.shape:
        return math.inf
    scale = exact.norm().clamp(min=1e-30)
    return float((mine - exact).norm() / scale)
