"""Every observer: training goes on as without it, whatever the model draws, keeps and counts in its forward pass."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.catalog import catalog

REST = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 40 steps } "
CLAUSES = {
    "norm_growth": "every 1 steps",
    "distance": "every 1 steps",
    "saturation": 'every 1 steps { c = 10, layers = "one" }',
    "homogeneity": 'every 1 steps { layers = "one" }',
    "calibration": "{ of = training, temperature = true }",
    "margin": '{ of = training, layer = "two" }',
    "consistency": 'on "one" every 1 steps { sigma = 0.1 }',
    "frequency": 'every 1 steps { probe = "tests.compiler.test_observers:batch", method = projection }',
}


class Restless(nn.Module):
    """Draws from every stream in every mode, and writes what it holds."""

    seen: Tensor
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.own = torch.Generator().manual_seed(1)
        self.calls, self.log = 0, list[float]()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.hidden = self.hidden + 1
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
        drawn.append(float(torch.rand((), generator=self.own)))
        self.log += drawn
        logits: Tensor = self.two(torch.tanh(self.one(x)) * (1 + 0.1 * sum(drawn)))
        return logits


def batch() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=made), torch.randint(3, (8,), generator=made)


def trained(clause: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what three steps leave behind, and the signals."""
    program = trainc.compile(REST + clause, Restless(), executor="module")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for _ in range(3):
        program.step(batch())
    model: Any = program.module
    left = {**model.state_dict(), "hidden": model.hidden, "torch": torch.get_rng_state()}
    left |= {"own": model.own.get_state(), "calls": model.calls, "log": model.log}
    of_numpy: Any = np.random.get_state()
    left |= {"numpy": of_numpy[1].tolist(), "python": random.getstate()}
    return left, dict(program.signals)


plain = cache(trained)


def test_every_observer_is_here() -> None:
    assert CLAUSES.keys() == {name for kind, name in catalog() if kind == "observe"}


@pytest.mark.parametrize("name", CLAUSES)
def test_training_and_all_random_streams_are_as_without_it(name: str) -> None:
    found, signals = trained(f"observe {name} {CLAUSES[name]}")
    for what, value in plain("")[0].items():
        same = (
            torch.equal(value, found[what]) if isinstance(value, Tensor) else value == found[what]
        )
        assert same, what
    assert any(signal.partition(".")[0] == name for signal in signals)
