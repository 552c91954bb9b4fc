"""Timing and checking on a CUDA device, and a stand-in without one to try the scripts on."""

import gc
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks.measure import Json
from benchmarks.operators import Problem, step
from trainc.kernels.library.graph_capture import random_numbers_survive

WARM_UP = 3
MOST_CALLS = 256
"""That a graph holds."""
# Relative to the norm of the exact result: sums in float32, results rounded once.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Work = Callable[[], object]
Lay = Callable[[Tensor], Tensor]


class Cuda:
    """The current CUDA device: works are timed in graphs of many calls, or between events."""

    kind, large = "cuda", True
    span, samples = 2e-3, 15
    """Seconds of calls that a graph holds, and how often it is replayed."""

    def name(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name()

    def cache(self) -> int:
        """Bytes of its last cache."""
        return int(torch.cuda.get_device_properties().L2_cache_size)

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The one stream of all works, so that a backward pass runs on the stream of its capture."""
        return torch.cuda.Stream()

    def side_stream(self) -> AbstractContextManager[object]:
        """Run what follows on that stream."""
        return torch.cuda.stream(self.stream)

    def captured(self, work: Work) -> tuple[Work, str]:
        """The work as a graph's replay, or as it is where it cannot be captured; it has run before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with random_numbers_survive(), torch.cuda.graph(graph, stream=self.stream):
                kept = work()
        except RuntimeError:
            torch.cuda.synchronize()
            return work, "eager"
        # The results keep the graph's memory from being given to the next one.
        return (lambda kept=kept: graph.replay()), "graph"

    def timed(self, works: Sequence[Work]) -> Json:
        """Microseconds of a call, going round the works: many calls a graph, and how it was run."""
        results: list[object] = [None] * len(works)

        def around(rounds: int) -> list[object]:
            for _ in range(rounds):
                for at, work in enumerate(works):
                    results[at] = (
                        work()
                    )  # outputs live for a round, so that memory is not written again at once
            return results

        for _ in range(WARM_UP):
            around(1)
        # A replay tells the device's time, which a call's host time may hide: so much is captured again.
        replay, _ = self.captured(lambda: around(1))
        replay()
        once = min(self.between(replay, 3))
        del replay
        rounds = max(1, min(MOST_CALLS // len(works), math.ceil(self.span / max(once, 1e-9))))
        many, how = self.captured(lambda: around(rounds))
        many()
        found = [spent / rounds / len(works) for spent in self.between(many, self.samples)]
        results.clear()
        return {**spread(found), "how": how, "calls between events": rounds * len(works)}

    def between(self, work: Work, count: int) -> list[float]:
        """Seconds between events around each of so many calls."""
        pairs = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def kernels(self, works: Sequence[Work]) -> Json:
        """What the profiler saw on the device: for every kernel, microseconds a launch and launches a call."""
        from torch.profiler import ProfilerActivity, profile

        for work in works:
            work()
        activities = [ProfilerActivity.CUDA] if self.kind == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=activities) as seen:
            for work in works:
                work()
            if self.kind == "cuda":
                torch.cuda.synchronize()
        found = {}
        for one in seen.key_averages():
            spent = one.self_device_time_total if self.kind == "cuda" else one.self_cpu_time_total
            if spent > 0 and not one.key.startswith(
                "cuda"
            ):  # calls of the runtime's are the host's
                calls = round(one.count / len(works), 2)
                found[one.key[:80]] = {"us": round(spent / one.count, 2), "a call": calls}
        return found

    def host(self, work: Work, calls: int = 100) -> float:
        """Microseconds of the host for a call of work that is small: less is queued than a device holds."""
        for _ in range(WARM_UP):
            work()
        found = []
        for _ in range(7):
            self.wait()
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            found.append((time.perf_counter() - begin) / calls)
        self.wait()
        return _us(min(found))

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        torch.cuda.synchronize()

    def conditions(self, when: str) -> Json:
        """The rate of a copy, and clocks and temperature while copies run."""
        size = 1 << 30
        begin = time.strftime("%H:%M:%S", time.gmtime())
        rate = copy_rate(self, size)
        a, b = (torch.empty(size, dtype=torch.uint8, device=self.kind) for _ in range(2))
        for _ in range(1000):  # some half a second
            b.copy_(a)
        clocks = _clocks()
        self.wait()
        return {"when": when, "at": begin, "copy TB/s": round(rate / 1e12, 3), **clocks}

    def clear(self) -> None:
        """Give memory back between measurements."""
        gc.collect()
        torch.cuda.synchronize()
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

    kind, large = "cpu", False
    span, samples = 0.0, 2

    def name(self) -> str:
        """Say that nothing was measured."""
        return "dry run"

    def cache(self) -> int:
        """Pretend to a small cache."""
        return 1 << 12

    def side_stream(self) -> AbstractContextManager[object]:
        """There is none."""
        return nullcontext()

    def captured(self, work: Work) -> tuple[Work, str]:
        """Leave the work as it is."""
        return work, "eager"

    def between(self, work: Work, count: int) -> list[float]:
        """Seconds on the wall."""
        found = []
        for _ in range(count):
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
        return found

    def wait(self) -> None:
        """Nothing to wait for."""

    def conditions(self, when: str) -> Json:
        """A small copy's."""
        return {"when": when, "copy TB/s": round(copy_rate(self, 1 << 16) / 1e12, 6)}

    def clear(self) -> None:
        """Nothing to give back."""

    def versions(self) -> Json:
        """Leave triton out: it need not be there."""
        return {"torch": torch.__version__}


def _clocks() -> Json:
    """Clocks in MHz, temperature and power of the device as the driver's own tool says, or why it does not."""
    names = ("uuid", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return {"clocks": f"unknown: {type(error).__name__}"}
    return clocks_of(str(torch.cuda.get_device_properties().uuid), done.stdout.splitlines(), names)


def clocks_of(device: str, lines: Sequence[str], names: Sequence[str]) -> Json:
    """Figures of the device with this UUID, or of the only one: the tool lists also those that CUDA does not see."""
    mine = [line for line in lines if device in line] or lines
    if len(mine) != 1:
        return {"clocks": "unknown: none of several devices is this one"}
    found = dict(zip(names, mine[0].split(", "), strict=False))
    return {name: value for name, value in found.items() if name != "uuid"}


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
    return 2 * size / float(device.timed(works)["median"]) * 1e6


def clones(problem: Problem, dtype: torch.dtype | None = None, lay: Lay | None = None) -> Problem:
    """The problem on copies of its tensors, in another dtype or laid out otherwise where one says so."""

    def copy(one: object) -> object:
        if not isinstance(one, Tensor):
            return one
        copied = one.detach().clone()
        copied = copied.to(dtype) if dtype and copied.is_floating_point() else copied
        copied = lay(copied) if lay is not None and copied.is_floating_point() else copied
        return copied.requires_grad_(one.requires_grad)

    cotangents = [one.to(dtype) if dtype else one for one in problem.cotangents]
    cotangents = cotangents if lay is None else [lay(one) for one in cotangents]
    return replace(problem, arguments=[copy(a) for a in problem.arguments], cotangents=cotangents)


def poison(likes: Sequence[Tensor | None]) -> None:
    """Leave memory of these sizes full of nan for the next allocations to find."""
    held = [
        torch.full_like(one, math.nan)
        for one in likes
        if one is not None and one.is_floating_point()
    ]
    del held


def unaligned(tensor: Tensor) -> Tensor:
    """The tensor one entry after the start of its memory, where no wide load may begin."""
    held = tensor.new_empty(tensor.numel() + 1)
    return held[1:].view(tensor.shape).copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The tensor with its first two dims the other way round in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def check(problem: Problem, dtype: torch.dtype, lay: Lay | None = None, repeats: int = 1) -> Json:
    """Compare ours with float64 on poisoned memory, and with itself on the same input, so often."""
    first = step(clones(problem, lay=lay), problem.ours)
    if not problem.cotangents:  # drawn by the first call on its clone
        drawn = [one for one in first if one is not None and one.requires_grad]
        problem.cotangents = [torch.randn_like(one) for one in drawn]
        first = step(clones(problem, lay=lay), problem.ours)
    equal = True
    for _ in range(repeats):
        poison(first)
        again = step(clones(problem, lay=lay), problem.ours)
        equal &= all(
            a is None or b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True)
        )
    wide = clones(problem, torch.float64)
    exact = step(wide, problem.exact or problem.aten, by_hand=True)
    errors = [
        _error(mine, true)
        for mine, true in zip(again, exact, strict=True)
        if mine is not None and true is not None
    ]
    worst = max((math.inf if math.isnan(error) else error for error in errors), default=math.inf)
    return {"error": worst, "passed": worst <= TOLERANCE[dtype], "repeatable": equal}


def _error(mine: Tensor, exact: Tensor) -> float:
    mine, exact = mine.detach().double(), exact.detach().double()
    if mine.shape != exact.shape:
        return math.inf
    scale = exact.norm().clamp(min=1e-30)
    return float((mine - exact).norm() / scale)
