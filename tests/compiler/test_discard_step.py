"""A step that is discarded has never begun: gradients, measurements, and what rules decided are forgotten."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.program.program import Program
from trainc.runtime.step.optimizer import OptimizerStep

SPEC = """
data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }
loss mse optimizer adamw { lr = 1e-2, clip = 1.0 } run { length = 20 steps, on_nan = skip }
when step >= 2 cooldown 90% { batch = batch * 2, warn "grown" }
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=g), torch.randn(size, 3, generator=g)


def at_the_rule(text: str = SPEC) -> Program:
    """Return a program before the step in which its rule fires."""
    program = trainc.compile(text, model())
    for seed in range(2):
        program.step(batch(seed))
    return program


def fired(program: Program) -> list[str]:
    return [line for line in program.summary() if "fired" in line]


def assert_same(one: Program, two: Program) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert {k: v for k, v in first.items() if k not in ("model", "actions")} == {
        k: v for k, v in second.items() if k not in ("model", "actions")
    }
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name]), name
    for name, state in first["actions"].items():
        for key, value in state.items():
            same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
            assert same(value, second["actions"][name][key]), (name, key)


def test_an_update_that_fails_does_not_let_a_rule_fire_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, straight = at_the_rule(), at_the_rule()

    def fail(*_: Any) -> None:
        raise ArithmeticError("no update")

    with monkeypatch.context() as patched:
        patched.setattr(OptimizerStep, "run", fail)
        with pytest.raises(ArithmeticError):
            program.step(batch(2))
    for one in (program, straight):
        one.step(batch(3, 8))
        assert one.report().notes[-1] == "grown"
        assert one.batch_size == 8
    assert fired(program) == fired(straight)
    assert_same(program, straight)


def test_a_discarded_step_has_never_begun() -> None:
    program, straight = at_the_rule(), at_the_rule()
    program.loss(batch(7)).backward()
    assert program.batch_size == 8
    program.discard_step()
    assert all(p.grad is None for p in program.module.parameters())
    assert program.batch_size == 4
    assert_same(program, straight)
    with pytest.raises(RuntimeError, match="nothing to update"):
        program.update()
    for one in (program, straight):
        one.begin()
        one.step(batch(3, 8))
    assert_same(program, straight)


def test_without_an_open_step_nothing_is_discarded() -> None:
    program, straight = at_the_rule(), at_the_rule()
    program.discard_step()
    program.step(batch(3))
    straight.step(batch(3))
    program.discard_step()
    assert_same(program, straight)


def test_a_state_saved_in_an_open_step_is_that_before_it() -> None:
    program, straight = at_the_rule(), at_the_rule()
    program.begin()
    state = copy.deepcopy(program.state_dict())
    resumed = trainc.compile(SPEC, model())
    resumed.load_state_dict(state)
    for one in (resumed, straight):
        one.begin()
        one.step(batch(3, 8))
    assert_same(resumed, straight)


def test_loading_a_state_discards_the_open_step() -> None:
    program, straight = at_the_rule(), at_the_rule()
    state = copy.deepcopy(straight.state_dict())
    program.loss(batch(7)).backward()
    program.load_state_dict(state)
    for one in (program, straight):
        one.step(batch(3, 8))
    assert_same(program, straight)


def test_a_skipped_step_counts_and_its_rule_has_fired() -> None:
    program = at_the_rule()
    x, y = batch(2)
    assert program.step((x * torch.nan, y))["skipped"] == 1.0
    assert program.clock.steps == 3
    assert program.batch_size == 8
    program.step(batch(3, 8))
    (line,) = fired(program)
    assert "fired once, at step 2" in line


def test_inside_a_step_it_is_an_error() -> None:
    program = trainc.compile(
        "loss mse optimizer sgd { lr = 0.1 } perturb sam { rho = 0.1 }", model()
    )
    program.module.register_forward_hook(lambda *_: program.discard_step())
    with pytest.raises(RuntimeError, match="`discard_step` was called inside a step, while `sam`"):
        program.step(batch(0))
