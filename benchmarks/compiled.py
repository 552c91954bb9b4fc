"""What trainc adds to a compiled step: plain `torch.compile` against specs with `compile = inductor`."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import trainc
from benchmarks.empty_spec import Batch, ByHand, Size, random_text, small_gpt
from benchmarks.measure import Json, Times, compared_over, in_processes, in_turn, seconds, timed

EXPECTED = "median ratio of step times, compiled with the noise scale on norms to plain torch.compile, at most 1.05"
GOAL = 1.05
SIZE = Size(layers=6, width=256, context=128, samples=8, rounds=16)
PROCESSES = 5
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


def measure(size: Size = SIZE, processes: int = PROCESSES) -> Json:
    """Measure on one thread: the step graph, which runs with the noise scale, and the modules beside it."""
    times = in_processes("benchmarks.compiled:steps", processes, size=asdict(size))
    begun = {name: round(every.pop(0).wall, 1) for name, every in times[0].items()}
    for one in times[1:]:
        for every in one.values():
            every.pop(0)
    ratios = {name: compared_over(times, name, PLAIN) for name in times[0] if name != PLAIN}
    return {
        "expected": EXPECTED,
        "met": ratios[NORMS]["cpu"]["median"] <= GOAL,
        "measured": {
            "size": asdict(size),
            "seconds": {name: seconds([t for one in times for t in one[name]]) for name in begun},
            "seconds of the first three steps": begun,
            "ratio to plain torch.compile": ratios,
        },
    }


def steps(size: Json) -> dict[str, list[Times]]:
    """Time the steps of every version in turn, after the first three together, in which all is compiled."""
    torch.set_num_threads(1)
    wanted = Size(**size)
    batch = random_text(wanted)
    programs = {
        "empty spec": trainc.compile(SPEC, small_gpt(wanted)),
        NORMS: trainc.compile(SPEC + GNS, small_gpt(wanted)),
        f"{NORMS}, modules": trainc.compile(SPEC + GNS, small_gpt(wanted), executor="module"),
    }
    found: dict[str, Step] = {
        PLAIN: _compiled(wanted),
        "plain torch.compile again": _compiled(wanted),
    }
    found |= {name: program.step for name, program in programs.items()}
    begun = {name: timed(partial(_first_steps, step, batch)) for name, step in found.items()}
    uncompiled = {
        n: p.execution.compiler.refused for n, p in programs.items() if p.execution.compiler
    }
    if any(uncompiled.values()):
        raise RuntimeError(f"nothing is compared, since not all was compiled: {uncompiled}")

    def once(step: Step) -> Times:
        return timed(lambda: step(batch))

    versions = {name: partial(once, step) for name, step in found.items()}
    return {name: [begun[name], *every] for name, every in in_turn(versions, wanted.rounds).items()}


def _first_steps(step: Step, batch: Batch) -> None:
    for _ in range(3):
        step(batch)
