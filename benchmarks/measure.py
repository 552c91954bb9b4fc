"""Side by side: two things timed in turn on one machine, and the ratio of their times.

Two clocks are read. Wall time includes whatever else the machine does; processor time does not, and
on a busy machine with one thread it is the one to trust.
"""

import json
import os
import platform
import random
import subprocess
import sys
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


def in_processes(function: str, count: int, **options: object) -> list[dict[str, list[Times]]]:
    """Return what `function`, named "module:function", timed in each of `count` processes, one after the other.

    Where a process places its memory makes all of its times a few percent longer or shorter, in one version more than
    in another: pairs of one process do not show that, another process does. Raises RuntimeError when one fails.
    """
    module, name = function.split(":")
    code = f"from {module} import {name} as work; from benchmarks.measure import tell; tell(work, {options!r})"
    found = []
    for _ in range(count):
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        if ran.returncode:
            raise RuntimeError(f"{function} failed with status {ran.returncode}")
        lists = json.loads(ran.stdout.splitlines()[-1])
        found.append({key: [Times(*pair) for pair in pairs] for key, pairs in lists.items()})
    return found


def tell(work: Callable[..., Mapping[str, Sequence[Times]]], options: Mapping[str, object]) -> None:
    """Print what was timed as one line of JSON, for the process that started this one."""
    found = work(**options)
    print(json.dumps({key: [(t.wall, t.cpu) for t in times] for key, times in found.items()}))


def compared_over(found: Sequence[Mapping[str, Sequence[Times]]], ours: str, theirs: str) -> Json:
    """Return the ratio of neighbouring times by process: the median of the processes' medians, and these in order."""
    every = [compared(one[ours], one[theirs]) for one in found]
    return {
        clock: {
            "median": round(median(one[clock]["median"] for one in every), 4),
            "processes": sorted(one[clock]["median"] for one in every),
            "pairs": sum(one[clock]["pairs"] for one in every),
        }
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
