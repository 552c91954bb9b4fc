"""Processes that train together are seen: a wrapper is found wherever it is, and processes that stay apart are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank

SPEC = "loss cross_entropy optimizer sgd { lr = 0.1 } noise_scale gns on all { smooth = 1 steps }"
STEPS = 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(40 + step)
    return torch.randn(8, 5).double(), torch.randint(0, 3, (8,))


def wrapped_in_the_loop(rank: int) -> Any:
    """Two micro-batches a step, by a wrapper that the program is never told of."""
    model = net()
    wrapper, program = DistributedDataParallel(model), trainc.compile(SPEC, model)
    metrics = []
    for step in range(STEPS):
        x, y = (part.split(4)[rank].split((1, 3)) for part in data(step))
        with wrapper.no_sync():
            with program.micro_batch(1, loss_weight=1 / 4):
                loss = cross_entropy(wrapper(x[0]), y[0])
            program.backward(loss)
        with program.micro_batch(3, loss_weight=3 / 4):
            loss = cross_entropy(wrapper(x[1]), y[1])
        program.backward(loss)
        metrics.append(program.update())
    return {"weights": model.state_dict(), "metrics": metrics, "batch": program.batch_size}


def wrapped_elsewhere(rank: int) -> Any:
    """A wrapper that the user keeps, and the program is never told of."""
    model = net()
    program = trainc.compile(SPEC, model)
    kept = [DistributedDataParallel(model)]
    for step in range(STEPS):
        x, y = (part.split(4)[rank] for part in data(step))
        program.loss((x, y)).backward()
        program.update()
    return {"weights": model.state_dict(), "same": program.forward is kept[0]}


def alone(rank: int) -> Any:
    model = net()
    program = trainc.compile(SPEC, model)
    program.step(data(rank))
    return {"weights": model.state_dict(), "notes": list(program.report().notes)}


def process(rank: int) -> Any:
    found = {"alone": alone(rank), "elsewhere": wrapped_elsewhere(rank)}
    return found | {"wrapped": wrapped_in_the_loop(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(__file__, 2, Path(tmp_path_factory.mktemp("apart")))


def test_a_wrapper_in_the_users_loop_is_found(found: list[dict[str, Any]]) -> None:
    model = net()
    program = trainc.compile(SPEC, model, executor="module")
    for step in range(STEPS):
        expected = program.step(data(step))
        for one in found:
            given = one["wrapped"]["metrics"][step]
            assert given.keys() == expected.keys()
            for name, value in expected.items():
                assert given[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name
    for one in found:
        assert one["wrapped"]["batch"] == 8
        for name, value in model.state_dict().items():
            torch.testing.assert_close(
                one["wrapped"]["weights"][name], value, rtol=1e-12, atol=1e-14
            )


def test_a_wrapper_that_the_user_keeps_is_found(found: list[dict[str, Any]]) -> None:
    model = net()
    program = trainc.compile(SPEC, model, executor="module")
    for step in range(STEPS):
        program.step(data(step))
    for one in found:
        assert one["elsewhere"]["same"]
        for name, value in model.state_dict().items():
            given = one["elsewhere"]["weights"][name]
            torch.testing.assert_close(given, value, rtol=1e-12, atol=1e-14)


def test_processes_that_stay_apart_are_told(found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        model = net()
        trainc.compile(SPEC, model).step(data(rank))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(one["alone"]["weights"][name], value, rtol=1e-12, atol=1e-14)
        assert any(
            "this process is one of 2, and nothing averages" in n for n in one["alone"]["notes"]
        )


if __name__ == "__main__":
    run_rank(process)
