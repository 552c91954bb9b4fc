"""A spec without a loss or an optimizer: what it measures and changes of gradients, in a loop that has its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError

RUN = "run { length = 100 steps, clip = 0.5, on_nan = skip }"
GNS = "noise_scale gns on all { smooth = 1 steps }"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(30 + step)
    return torch.randn(6, 5).double(), torch.randint(0, 3, (6,))


def test_gradients_are_clipped_and_measured_and_then_the_users() -> None:
    ours, hand = net(), net()
    program = trainc.compile(f"{RUN} {GNS}", ours)
    one, other = (torch.optim.AdamW(model.parameters(), lr=0.1) for model in (ours, hand))
    theirs = trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 0 }} {RUN} {GNS}", net())
    for i in range(3):
        x, y = data(i)
        with program.micro_batch(6):
            loss = cross_entropy(ours(x), y)
        program.backward(loss)
        found = program.update()
        if not i:  # with the same weights
            expected = theirs.step((x, y))
            for name in found:
                assert found[name] == pytest.approx(expected[name], rel=1e-10, nan_ok=True), name
        one.step()
        one.zero_grad()
        cross_entropy(hand(x), y).backward()
        norm = nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
        assert found["gradient_norm"] == pytest.approx(float(norm), rel=1e-12)
        other.step()
        other.zero_grad()
    for mine, by_hand in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine, by_hand, rtol=1e-12, atol=1e-14)


def test_a_step_that_is_skipped_leaves_the_users_optimizer_nothing() -> None:
    model = net()
    program = trainc.compile(RUN, model)
    x, y = data(0)
    with program.micro_batch(6):
        loss = cross_entropy(model(x * torch.nan), y)
    program.backward(loss)
    assert program.update()["skipped"] == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_were_not_freed_are_noticed(to_none: bool) -> None:
    model = net()
    program = trainc.compile("", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data(0)

    def step() -> None:
        with program.micro_batch(6):
            loss = cross_entropy(model(x), y)
        program.backward(loss)
        program.update()
        optimizer.step()

    step()
    with pytest.raises(
        RuntimeError, match="call `step\\(\\)` and `zero_grad\\(\\)` of your optimizer"
    ):
        step()
    optimizer.zero_grad(set_to_none=to_none)
    step()
    assert program.clock.steps == 2


def test_a_resumed_measurement_is_the_uninterrupted_one() -> None:
    models = net(), net()
    whole, first = (trainc.compile(GNS, model) for model in models)

    def step(program: trainc.Program, model: nn.Module, i: int) -> dict[str, float]:
        x, y = data(i)
        with program.micro_batch(6):
            loss = cross_entropy(model(x), y)
        program.backward(loss)
        found = program.update()
        model.zero_grad()
        return found

    for i in range(2):
        step(whole, models[0], i)
        step(first, models[1], i)
    again = net()
    resumed = trainc.compile(GNS, again)
    resumed.load_state_dict(first.state_dict())
    assert str(step(whole, models[0], 2)) == str(step(resumed, again, 2))


@pytest.mark.parametrize("call", ["loss", "step", "graph"])
def test_who_needs_the_specs_loss_says_so(call: str) -> None:
    program = trainc.compile("optimizer sgd { lr = 0.1 }", net())
    with pytest.raises(ValueError, match=r"the spec has no loss.*program\.backward\(loss\)"):
        getattr(program, call)(data(0))
    with pytest.raises(ValueError, match="the spec has no loss"):
        program.evaluate(*data(0))


@pytest.mark.parametrize(
    "clause",
    [
        "lr layer_decay on all { decay = 0.5 }",
        'mask magnitude on "0.weight" { density = 0.5 }',
        "lr trust_ratio on all",
        "distribute local every 8 steps { rule = average }",
    ],
)
def test_what_acts_on_an_optimizer_needs_one(clause: str) -> None:
    with pytest.raises(SpecError, match=r"acts on what an optimizer does|no optimizer trains"):
        trainc.compile(f"loss cross_entropy {clause}", net())


@pytest.mark.parametrize(
    ("missing", "rest"), [("loss", "optimizer sgd { lr = 0.1 }"), ("optimizer", "loss mse")]
)
def test_a_run_needs_both(missing: str, rest: str, tmp_path: Path) -> None:
    spec = f'model "a:b" data "a:c" {{ batch = 8 samples }} run {{ length = 2 steps }} {rest}'
    with pytest.raises(SpecError, match=f"the spec has no {missing}"):
        train(spec, tmp_path / "out")
