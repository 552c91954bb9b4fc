"""A particle swarm against its definition, number by number, and resumed runs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import trainc
from examples.data import curve_points
from tests.compiler.constructs import test_scipy
from tests.conformance import Setup
from trainc.compiler.constructs.optimizer.swarm import Swarm

CLAUSE = "optimizer swarm { particles = 6, spread = 0.3, seed = 5 }"
BASE = "loss mse run { length = 40 steps } "


def loss_at(model: nn.Module, place: Tensor) -> float:
    vector_to_parameters(place.clone(), model.parameters())
    x, y = test_scipy.batch()
    return float(torch.nn.functional.mse_loss(model(x), y).detach())


def by_hand(steps: int) -> Tensor:
    """Return the best place after some steps, one particle and one number at a time."""
    model, rule = test_scipy.net(), Swarm()
    start = parameters_to_vector(model.parameters()).detach().clone()
    places = start.expand(6, -1).clone()
    speeds = torch.zeros_like(places)
    own, values = places.clone(), [0.0] * 6
    for step in range(steps):
        drawn = np.random.default_rng((5, step))
        if step == 0:
            places[1:] = (start + 0.3 * torch.from_numpy(drawn.standard_normal(places.shape)))[1:]
            own, values = places.clone(), [loss_at(model, place) for place in places]
        best = own[values.index(min(values))].clone()
        for i in range(6):
            weights = drawn.random((2, len(start)))
            for j in range(len(start)):
                drawn_here = float(weights[0, j]), float(weights[1, j])
                place, speed, mine, shared = (
                    float(one[j]) for one in (places[i], speeds[i], own[i], best)
                )
                places[i, j], speeds[i, j] = rule.reference(place, speed, mine, shared, drawn_here)
            value = loss_at(model, places[i])
            if value < values[i]:
                own[i], values[i] = places[i], value
    return own[values.index(min(values))]


def test_it_descends_evaluates_each_particle_and_resumes_bit_for_bit() -> None:
    program = trainc.compile(BASE + CLAUSE, test_scipy.net().float())
    data = curve_points(32)
    rows = [program.step(data) for _ in range(6)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["swarm.evaluations"] for row in rows[1:]] == [7.0] * 5  # and the model itself
    fresh = trainc.compile(BASE + CLAUSE, test_scipy.net().float())
    fresh.load_state_dict(copy.deepcopy(program.state_dict()))
    torch.manual_seed(9)
    for _ in range(3):
        assert program.step(data) == fresh.step(data)


def test_it_draws_from_no_other_stream() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    program = trainc.compile(BASE + CLAUSE, test_scipy.net())
    torch.set_rng_state(before)
    program.step(test_scipy.batch())
    assert torch.equal(before, torch.get_rng_state())


def test_too_many_parameters_are_refused() -> None:
    with pytest.raises(trainc.SpecError, match="at most 10,000 parameters together"):
        trainc.plan(BASE + CLAUSE, nn.Linear(200, 100))


def conformance() -> Setup:
    return test_scipy.conformance()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after three steps, by the program and by definition."""
    program = trainc.compile(BASE + CLAUSE, test_scipy.net())
    for _ in range(3):
        program.step(test_scipy.batch())
    found = parameters_to_vector(program.module.parameters()).detach()
    return {"weights": found}, {"weights": by_hand(3)}
