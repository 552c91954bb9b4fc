"""What trainc adds to a compiled step: plain `torch.compile` against specs with `compile = inductor`."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import trainc
from benchmarks.empty_spec import Batch, ByHand, Size, random_text, small_gpt
from benchmarks.measure import Json, Times, compared, in_turn, seconds, timed

EXPECTED = "median ratio of step times, compiled with the noise scale on norms to plain torch.compile, at most 1.05"
GOAL = 1.05
SIZE = Size(layers=6, width=256, context=128, samples=8, rounds=24)
SPEC = """train 1
run { length = 100k steps, compile = inductor }
loss cross_entropy
optimizer adamw { lr = 1e-4, weight_decay = 0.01 }
"""
GNS = "noise_scale gns on role(norm)\n"
NORMS, PLAIN = "noise scale on norms", "plain torch.compile"


Step = Callable[[Batch], object]


def _compiled(size: Size) -> Step:
    """Return the step of the loop anybody writes, around a compiled model."""
    model: Any = torch.compile(small_gpt(size))
    return ByHand(model).step


def measure(size: Size = SIZE) -> Json:
    """Measure on one thread: the step graph, which runs with the noise scale, and the modules beside it."""
    torch.set_num_threads(1)
    batch = random_text(size)
    programs = {
        "empty spec": trainc.compile(SPEC, small_gpt(size)),
        NORMS: trainc.compile(SPEC + GNS, small_gpt(size)),
        f"{NORMS}, modules": trainc.compile(SPEC + GNS, small_gpt(size), executor="module"),
    }
    steps: dict[str, Step] = {
        PLAIN: _compiled(size),
        "plain torch.compile again": _compiled(size),
    }
    steps |= {name: program.step for name, program in programs.items()}
    begun = {name: _first_steps(step, batch) for name, step in steps.items()}
    uncompiled = {
        n: p.execution.compiler.refused for n, p in programs.items() if p.execution.compiler
    }
    if any(uncompiled.values()):
        raise RuntimeError(f"nothing is compared, since not all was compiled: {uncompiled}")

    def once(step: Step) -> Times:
        return timed(lambda: step(batch))

    times = in_turn({name: partial(once, step) for name, step in steps.items()}, size.rounds)
    ratios = {name: compared(found, times[PLAIN]) for name, found in times.items() if name != PLAIN}
    return {
        "expected": EXPECTED,
        "met": ratios[NORMS]["cpu"]["median"] <= GOAL,
        "measured": {
            "size": asdict(size),
            "seconds": {name: seconds(found) for name, found in times.items()},
            "seconds of the first three steps": begun,
            "ratio to plain torch.compile": ratios,
        },
    }


def _first_steps(step: Step, batch: Batch) -> float:
    """Return the seconds of three steps, in which all is compiled."""
    begun = time.perf_counter()
    for _ in range(3):
        step(batch)
    return round(time.perf_counter() - begun, 1)
