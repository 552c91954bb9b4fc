"""Extrapolation; its loops by hand stand in test_looksam.py and test_sam_replicas.py, with those of its family."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor

import trainc
from tests.compiler.constructs.test_sam import before_pass, data, kept, net
from tests.conformance import Setup
from trainc.compiler.constructs.perturb.extrapolate import Extrapolate

BASE = "loss cross_entropy optimizer sgd { lr = 0.3, momentum = 0.9 } "


def clause(fields: str) -> str:
    return f"{BASE}perturb extrapolate {{ {fields} }}"


def moves(fields: str, steps: int = 3) -> list[dict[str, Tensor]]:
    """Return how far the weights are from their own values in the passes of each step."""
    model, found, seen = net(), [], list[dict[str, Tensor]]()
    program = trainc.compile(clause(fields), model)
    for i in range(steps):
        before = kept(model)
        with before_pass(model, lambda _: seen.append(kept(model))) as calls:
            program.step(data(i))
        assert calls == [1]
        found.append({n: seen[-1][n] - before[n] for n in before})
    return found


def length(move: dict[str, Tensor]) -> float:
    return float(torch.cat([one.flatten() for one in move.values()]).norm())


@pytest.mark.parametrize("direction", ["past_gradient", "momentum", "noise"])
def test_a_radius_is_the_length_of_every_step_that_has_a_direction(direction: str) -> None:
    found = [length(one) for one in moves(f"direction = {direction}, radius = 0.4")]
    first = 0.4 if direction == "noise" else 0.0
    assert found == pytest.approx([first, 0.4, 0.4], rel=1e-9)


def test_with_momentum_a_radius_is_momentum_sam() -> None:
    ours, theirs = net(), net()
    one = trainc.compile(clause("direction = momentum, radius = 0.4"), ours)
    two = trainc.compile(BASE + "perturb msam { rho = 0.4 }", theirs)
    for i in range(3):
        one.step(data(i))
        two.step(data(i))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_noise_is_standard_normal_times_its_rate_and_new_in_each_step() -> None:
    first, second, _ = moves("direction = noise, rate = 0.1")
    numbers = torch.cat([one.flatten() for one in first.values()]) / 0.1
    assert abs(float(numbers.mean())) < 5 / len(numbers) ** 0.5
    assert float(numbers.var()) == pytest.approx(1, abs=5 * (2 / len(numbers)) ** 0.5)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    again, _, _ = moves("direction = noise, rate = 0.1")
    assert torch.equal(first["0.weight"], again["0.weight"])


def test_a_resumed_run_has_the_past_gradient() -> None:
    program = trainc.compile(clause("direction = past_gradient, rate = 0.4"), net())
    program.step(data(0))
    state = copy.deepcopy(program.state_dict())
    later = trainc.compile(clause("direction = past_gradient, rate = 0.4"), net())
    later.load_state_dict(state)
    assert later.step(data(1)) == program.step(data(1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("direction = noise", "write `rate` or `radius`"),
        ("direction = noise, rate = 1, radius = 1", "write `rate` or `radius`"),
        ("direction = momentum, rate = 1, scope = all", "all processes have one momentum"),
        ("direction = forwards, rate = 1", "expected"),
    ],
)
def test_wrong_fields_are_errors_at_the_clause(fields: str, said: str) -> None:
    (found,) = trainc.check(clause(fields)).diagnostics
    assert re.search(said, found.labels[0].text + found.message)
    assert found.labels[0].span.start >= len(BASE)


def test_momentum_needs_an_optimizer_that_has_it() -> None:
    without = BASE.replace(", momentum = 0.9", "")
    for fields in ("direction = momentum, rate = 1", "direction = noise, rate = 1, look_ahead = 1"):
        with pytest.raises(trainc.SpecError, match="has no momentum"):
            trainc.plan(f"{without}perturb extrapolate {{ {fields} }}", net())
    ahead = clause("direction = past_gradient, rate = 0, look_ahead = 1")
    assert "no effect" not in str(trainc.plan(ahead, net()).warnings)


def conformance() -> Setup:
    """Return a setup in which all processes have one past gradient, so that they train as one does."""
    fields = "direction = past_gradient, rate = 0.01, scope = all"
    return Setup(usage=f"perturb extrapolate {{ {fields} }}")


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the moves of the second step, and those of `reference` from the gradient of the first."""
    model = net()
    x, y = data(0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    past = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    method = Extrapolate(direction="past_gradient", rate=0.4)  # type: ignore[arg-type]
    _, second = moves("direction = past_gradient, rate = 0.4", steps=2)
    return second, method.reference(past, 0.4)
