"""What observers cost: their share of the time of training, at the interval that each one's own example has."""

import re
from dataclasses import asdict

import torch

import trainc
from benchmarks.empty_spec import SPEC, Size, random_text, small_gpt
from benchmarks.measure import Json, Times, compared_over, in_processes, in_turn, timed
from trainc.compiler.catalog import catalog

EXPECTED = (
    "each observer of training steps takes less than 1 % of the time at its example's interval"
)
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
EVALUATIONS = {
    "calibration": "",
    "calibration, with the temperature": "{ temperature = true }",
    "margin": "",
}
"""Observers of evaluations, which are measured as often as there is one."""


def measure() -> Json:
    """Measure all observers on one thread."""
    steps = in_processes("benchmarks.observers:steps", PROCESSES, size=asdict(SIZE))
    found: Json = {}
    for name in STEPS:
        ratio = compared_over(steps, name, "plain")
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


def _usage(name: str) -> str:
    return catalog()["observe", name.partition(",")[0]].usage


def _interval(name: str) -> int:
    """Return every how many steps the example of an observer measures."""
    found = re.search(r"every (\d+) steps", _usage(name))
    assert found is not None
    return int(found[1])


def _clause(name: str, fields: str) -> str:
    """Return a clause that measures in every step."""
    usage = re.sub(r"every \d+ steps", "", _usage(name))
    return usage.partition("{")[0] + fields if fields else usage


def steps(size: Json) -> dict[str, list[Times]]:
    """Time steps without and with one observation, in turn."""
    torch.set_num_threads(1)
    wanted = Size(**size)
    spec, batch = SPEC % (wanted.samples, wanted.context), random_text(wanted)
    clauses = {"plain": "", **{name: _clause(name, fields) for name, fields in STEPS.items()}}
    programs = {
        name: trainc.compile(spec + clause, small_gpt(wanted), executor="module")
        for name, clause in clauses.items()
    }
    work = {
        name: (lambda program=program: timed(lambda: program.step(batch)))
        for name, program in programs.items()
    }
    return in_turn(work, wanted.rounds, warm_up=4)


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
