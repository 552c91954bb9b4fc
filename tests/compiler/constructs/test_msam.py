"""Momentum SAM; its loop by hand stands in test_looksam.py, with those of its family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import trainc
from tests.compiler.constructs.test_sam import before_pass, data, kept, net
from trainc.compiler.constructs.perturb.msam import Msam


def test_a_step_has_one_pass_and_the_first_moves_nothing() -> None:
    model = net()
    spec = "loss cross_entropy optimizer adamw { lr = 0.1 } perturb msam { rho = 0.5 }"
    program, seen = trainc.compile(spec, model), []
    for i in range(2):
        before = kept(model)
        with before_pass(model, lambda _: seen.append(kept(model))) as calls:
            program.step(data(i))
        assert calls == [1]
        length = torch.cat([(seen[i][n] - before[n]).flatten() for n in before]).norm()
        assert float(length) == pytest.approx(0.5 * i, rel=1e-9)
    assert "for the passes of 1 step," in program.summary()[-1]


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the moves of the second step, and those that `reference` gives of the momentum."""
    model = net()
    spec = (
        "loss cross_entropy optimizer sgd { lr = 0.3, momentum = 0.9 } perturb msam { rho = 0.5 }"
    )
    program, seen = trainc.compile(spec, model), []
    program.step(data(0))
    before = kept(model)
    momentum = {
        n: program._machine._optimizer_states[0](n)["momentum_buffer"].clone() for n in before
    }
    with before_pass(model, lambda _: seen.append(kept(model))):
        program.step(data(1))
    moves = {n: seen[0][n] - before[n] for n in before}
    return moves, Msam(rho=0.5).reference(momentum, 0.5)  # type: ignore[arg-type]
