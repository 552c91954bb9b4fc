"""`clip` of a clause clips its own parameters, `clip` of `run` the gradients of all optimizers together."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.gradient_methods import Lars, spec
from trainc.dsl.text.errors import SpecError

TWO = """loss cross_entropy
optimizer sgd as mats on ndim(2) {{ lr = 1{mats} }}
optimizer sgd as vecs on ndim(1) {{ lr = 1{vecs} }}
run {{ length = 9 steps{run} }}
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.randint(3, (8,))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    x, y = batch()
    model = copy.deepcopy(model)
    nn.functional.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm(found: dict[str, Tensor], ndim: int | None = None) -> float:
    of = [g for g in found.values() if ndim in (None, g.ndim)]
    return math.sqrt(sum(float(g.double().square().sum()) for g in of))


def step(mats: str = "", vecs: str = "", run: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what one step at rate 1 takes off the weights, and its metrics."""
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = trainc.compile(TWO.format(mats=mats, vecs=vecs, run=run), model)
    metrics = program.step(batch())
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}, metrics


def test_a_clause_clips_its_own_parameters_alone() -> None:
    moved, metrics = step(mats=", clip = 0.01")
    plain = gradients(net())
    assert norm(moved, 2) == pytest.approx(0.01, rel=1e-3)
    assert norm(moved, 1) == pytest.approx(norm(plain, 1), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm(plain))
    assert metrics["mats.gradient_norm"] == pytest.approx(norm(plain, 2))
    moved, _ = step(mats=", clip = 0.01", vecs=", clip = 0.02")
    assert [norm(moved, n) for n in (2, 1)] == pytest.approx([0.01, 0.02], rel=1e-3)


def test_the_run_clips_all_together_as_torch_does() -> None:
    moved, metrics = step(run=", clip = 0.05")
    plain = gradients(net())
    assert norm(moved) == pytest.approx(0.05, rel=1e-3)
    assert metrics["gradient_norm"] == pytest.approx(norm(plain))
    for name, gradient in plain.items():
        torch.testing.assert_close(moved[name] / norm(moved), gradient / norm(plain))
    model = net()
    other = trainc.compile("loss cross_entropy optimizer sgd { lr = 1, clip = 0.05 }", model)
    other.step(batch())
    assert torch.equal(
        net().get_parameter("0.bias") - moved["0.bias"], model.get_parameter("0.bias")
    )


def test_both_limits_hold() -> None:
    moved, _ = step(mats=", clip = 0.04", run=", clip = 0.05")
    assert norm(moved) == pytest.approx(0.05, rel=1e-3)
    moved, _ = step(mats=", clip = 0.01", vecs=", clip = 0.01", run=", clip = 9")
    assert [norm(moved, n) for n in (2, 1)] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_equal_limits_of_two_clauses_are_ambiguous() -> None:
    with pytest.raises(SpecError, match=r"`mats` and `vecs` both clip to the norm 0\.05") as error:
        step(mats=", clip = 0.05", vecs=", clip = 0.05")
    assert "write `run { clip = 0.05 }`" in str(error.value)


@pytest.mark.parametrize("where", ["optimizer", "run"])
def test_clipping_is_bit_equal_to_torch_and_never_overflows(where: str) -> None:
    ours, theirs = net(), net()
    own, whole = (", clip = 0.1", "") if where == "optimizer" else ("", ", clip = 0.1")
    text = (
        f"loss cross_entropy optimizer adamw {{ lr = 1e-2{own} }} run {{ length = 9 steps{whole} }}"
    )
    program = trainc.compile(text, ours)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        x, y = batch()
        program.step((x, y))
        nn.functional.cross_entropy(theirs(x), y).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    linear = nn.Linear(2, 1, bias=False)
    clipped = trainc.compile(
        f"loss mse optimizer sgd {{ lr = 1{own} }} run {{ length = 9 steps{whole} }}", linear
    )
    before = linear.weight.detach().clone()
    metrics = clipped.step((torch.full((1, 2), 1e15), torch.full((1, 1), 1e10)))
    assert 1e29 < metrics["gradient_norm"] < math.inf
    assert float((before - linear.weight).detach().norm()) == pytest.approx(0.1, rel=1e-4)


def test_what_a_clause_changes_is_clipped_after_it() -> None:
    model, plain = net(), net()
    text = "loss cross_entropy optimizer sgd { lr = 1 } run { length = 9 steps, clip = 1e-4 }"
    program = trainc.compile(spec(text, Lars()), model)
    changed = program.step(batch())["gradient_norm"]
    before = dict(plain.named_parameters())
    moved = {n: before[n].detach() - p.detach() for n, p in model.named_parameters()}
    assert norm(moved) == pytest.approx(1e-4, rel=1e-2)
    assert changed != pytest.approx(norm(gradients(plain)))


def test_summary_and_plan_say_it() -> None:
    program = trainc.compile(TWO.format(mats="", vecs="", run=", clip = 1e-3"), net())
    program.step(batch())
    assert "run clip: clipped 1 of 1 steps to norm 0.001" in program.summary()
    assert "clip the gradients of all optimizers to one norm" in str(program.plan)


def test_an_optimizer_that_asks_again_is_not_clipped() -> None:
    text = 'run { length = 9 steps, clip = 1 } loss mse optimizer torch("torch.optim:LBFGS") { lr = 1 }'
    with pytest.raises(SpecError, match="clipped gradients would not be those of the loss"):
        trainc.compile(text, net())
