"""Side by side: two things timed in turn on one machine, and the ratio of their times.

Two clocks are read. Wall time includes whatever else the machine does; processor time does not, and
on a busy machine with one thread it is the one to trust.
"""

import os
import platform
import random
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import ROOT

Work = Callable[[], object]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one call: on the wall and on the processor."""

    wall: float
    cpu: float


def timed(work: Work) -> Times:
    """Time one call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def timed_process(command: Sequence[str]) -> Times:
    """Time a whole process from its start to its end; raises RuntimeError when it fails."""
    # Compiled modules are kept between runs, as for everybody.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    process = os.posix_spawn(
        command[0],
        list(command),
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return Times(wall, usage.ru_utime + usage.ru_stime)


def in_turn(
    versions: Mapping[str, Callable[[], Times]], rounds: int, warm_up: int = 2
) -> dict[str, list[Times]]:
    """Time every version once a round, in an order that turns round by round."""
    names = list(versions)
    found: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        for name in names if number % 2 else reversed(names):
            times = versions[name]()
            if number >= 0:
                found[name].append(times)
    return found


def compared(ours: Sequence[Times], theirs: Sequence[Times]) -> Json:
    """Return the ratio of neighbouring times, ours to theirs: median, its 95% interval, quartiles."""
    return {
        clock: _ratio(
            [getattr(a, clock) / getattr(b, clock) for a, b in zip(ours, theirs, strict=True)]
        )
        for clock in ("wall", "cpu")
    }


def _ratio(ratios: Sequence[float]) -> Json:
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    low, _, high = quantiles(ratios, n=4)
    return {
        "median": round(median(ratios), 4),
        "interval": [round(medians[25], 4), round(medians[974], 4)],
        "quartiles": [round(low, 4), round(high, 4)],
        "pairs": len(ratios),
    }


def seconds(times: Sequence[Times]) -> Json:
    """Return the median and the least time by both clocks."""
    return {
        clock: {
            "median": round(median(getattr(t, clock) for t in times), 6),
            "least": round(min(getattr(t, clock) for t in times), 6),
        }
        for clock in ("wall", "cpu")
    }


def machine() -> Json:
    """Describe the machine and the versions that were measured."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "trainc": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def load() -> list[float]:
    """Return how many processes wanted a core in the last 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]
