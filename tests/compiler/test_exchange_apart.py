"""What clauses measure and keep beside `distribute local` is of one replica, as its losses are."""

import copy
import math
from pathlib import Path
from typing import Any

import torch

import trainc
from tests.compiler.exchange_cases import SGD, data, net, state
from tests.processes import run_processes, run_rank
from trainc.compiler.program.program import Program

EVERY_2 = "distribute local every 2 steps"
LENGTH = "run { length = 9 steps, on_nan = skip } "
CLASSES = "loss cross_entropy optimizer sgd { lr = 0.1 } " + LENGTH
CALIBRATION = " observe calibration { of = training }"
AHEAD = " perturb extrapolate { radius = 0.1, direction = past_gradient, scope = local }"


def classes(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data(rank, step)
    return x, y.argmax(1)


def observed(rank: int) -> Any:
    """Return what an observer finds after steps of which rank 1 skips one."""
    found = []
    program = trainc.compile(CLASSES + EVERY_2 + CALIBRATION, net())
    for step in range(4):
        x, y = classes(rank, step)
        metrics = program.step((x * math.nan if (rank, step) == (1, 1) else x, y))
        found.append({name: value for name, value in metrics.items() if "calibration" in name})
    return found, state(program)


def resumed(rank: int) -> bool:
    """Say whether a run that goes on from its state equals the one that made it."""
    straight = trainc.compile(SGD + LENGTH + EVERY_2 + AHEAD, net())
    for step in range(3):
        straight.step(data(rank, step))
    later = trainc.compile(SGD + LENGTH + EVERY_2 + AHEAD, net(seed=9))
    later.load_state_dict(copy.deepcopy(straight.state_dict()))
    pairs = [[program.step(data(rank, step)) for step in (3, 4)] for program in (straight, later)]
    return pairs[0] == pairs[1]


def process(rank: int) -> Any:
    return {"observed": observed(rank), "resumed": resumed(rank)}


def alone(rank: int, weights: list[dict[str, torch.Tensor]] | None = None) -> Any:
    """Return the figures of a replica on its own until the first turn."""
    program: Program = trainc.compile(CLASSES + CALIBRATION, net())
    return program.step(classes(rank, 0))


def test_figures_and_state_are_those_of_the_replica(tmp_path: Path) -> None:
    found = run_processes(__file__, 2, tmp_path)
    for rank, one in enumerate(found):
        figures, _ = one["observed"]
        wanted = {name: value for name, value in alone(rank).items() if "calibration" in name}
        assert wanted
        assert figures[0] == wanted
        assert [bool(of_step) for of_step in figures] == [True, rank == 0, True, True]
        assert one["resumed"]
    first, second = (one["observed"][1] for one in found)
    assert all(torch.equal(first[name], second[name]) for name in first if "num" not in name)


if __name__ == "__main__":
    run_rank(process)
