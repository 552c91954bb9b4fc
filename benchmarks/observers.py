"""What observers cost: their share of the time of training, at the interval that each one has by default."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

import trainc
from benchmarks.empty_spec import SPEC, Batch, Size, random_text, small_gpt
from benchmarks.measure import Json, Times, compared_over, in_processes, in_turn, timed
from examples.data import curve_points
from examples.models import tanh_net
from trainc.compiler.catalog import catalog
from trainc.dsl.reading.construct import Construct

EXPECTED = "each observer of training steps takes less than 1 % of the time at its default interval"
GOAL = 0.01
PROCESSES = 2
SIZE = Size(layers=4, width=192, context=64, samples=8, rounds=12)
STEPS = {
    "norm_growth": "",
    "distance": "",
    "saturation": "",
    "saturation, with layers and heads": '{ layers = "blocks.*", heads = true }',
    "homogeneity": "",
    "consistency": "",
}
"""Observers of training steps, with fields in place of their example's."""
CURVE_ROUNDS = 60
OF_CURVES = {"frequency": ""}
"""Those of them that measure no text: beside steps of a small network on as many points as the probe has."""
CURVES = """train 1
data "examples.data:curve" { batch = 64 samples }
run { length = 100k steps }
loss mse
optimizer adamw { lr = 1e-4, weight_decay = 0.01 }
"""
EVALUATIONS = {
    "calibration": "",
    "calibration, with the temperature": "{ temperature = true }",
    "margin": "",
}
"""Observers of evaluations, which are measured as often as there is one."""


def measure() -> Json:
    """Measure all observers on one thread."""
    steps = in_processes("benchmarks.observers:steps", PROCESSES, size=asdict(SIZE))
    curves = in_processes("benchmarks.observers:curves", PROCESSES, rounds=CURVE_ROUNDS)
    found: Json = {}
    for name in (*STEPS, *OF_CURVES):
        ratio = compared_over(curves if name in OF_CURVES else steps, name, "plain")
        observed = ratio["cpu"]["median"] - 1
        every = _interval(name)
        found[name] = {
            "every": every,
            "one observation, in steps": round(observed, 3),
            "share of the time": round(max(0.0, observed) / every, 5),
            "ratio of a step with one": ratio,
        }
    evaluations = in_processes("benchmarks.observers:evaluations", PROCESSES, size=asdict(SIZE))
    of_evaluations = {
        name: {"ratio of an evaluation": compared_over(evaluations, name, "plain")}
        for name in EVALUATIONS
    }
    return {
        "expected": EXPECTED,
        "met": all(one["share of the time"] < GOAL for one in found.values()),
        "measured": {"size": asdict(SIZE), "steps": found, "evaluations": of_evaluations},
    }


def _construct(name: str) -> type[Construct]:
    return catalog()["observe", name.partition(",")[0]]


def _interval(name: str) -> int:
    """Return every how many steps an observer measures where a spec does not say."""
    every = _construct(name).default_every
    assert every is not None
    steps, unit = every.split()
    assert unit == "steps"
    return int(steps)


def _clause(name: str, fields: str) -> str:
    """Return a clause that measures in every step."""
    usage = re.sub(r"every \d+ steps", "every 1 steps", _construct(name).usage)
    return usage.partition("{")[0] + fields if fields else usage


def steps(size: Json) -> dict[str, list[Times]]:
    """Time steps without and with one observation, in turn."""
    torch.set_num_threads(1)
    wanted = Size(**size)
    spec, batch = SPEC % (wanted.samples, wanted.context), random_text(wanted)
    return _steps(STEPS, spec, lambda: small_gpt(wanted), batch, wanted.rounds)


def curves(rounds: int) -> dict[str, list[Times]]:
    """Time steps of a small network on a curve without and with one observation, in turn."""
    torch.set_num_threads(1)
    return _steps(OF_CURVES, CURVES, tanh_net, curve_points(), rounds)


def _steps(
    observers: Mapping[str, str],
    spec: str,
    model: Callable[[], torch.nn.Module],
    batch: Batch,
    rounds: int,
) -> dict[str, list[Times]]:
    clauses = {"plain": "", **{name: _clause(name, fields) for name, fields in observers.items()}}
    programs = {
        name: trainc.compile(spec + clause, model(), executor="module")
        for name, clause in clauses.items()
    }
    work = {
        name: (lambda program=program: timed(lambda: program.step(batch)))
        for name, program in programs.items()
    }
    return in_turn(work, rounds, warm_up=4)


def evaluations(size: Json) -> dict[str, list[Times]]:
    """Time evaluations without and with an observer, in turn."""
    torch.set_num_threads(1)
    wanted = Size(**size)
    spec, batch = SPEC % (wanted.samples, wanted.context), random_text(wanted)
    clauses = {"plain": "", **{name: _clause(name, fields) for name, fields in EVALUATIONS.items()}}

    def evaluate(program: trainc.Program) -> None:
        with torch.no_grad():
            program.evaluate(*batch)
        program.evaluation_metrics()

    programs = {
        name: trainc.compile(spec + clause, small_gpt(wanted), executor="module")
        for name, clause in clauses.items()
    }
    work = {
        name: (lambda program=program: timed(lambda: evaluate(program)))
        for name, program in programs.items()
    }
    return in_turn(work, wanted.rounds, warm_up=4)
