"""Rates, decays and betas that move, by selector and by place: against loops by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.cli.plan_text import print_plan

STEPS = 8
SPEC = f"loss mse run {{ length = {STEPS} steps }} "


class Net(nn.Module):
    """Three blocks of one layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        out: Tensor = self.head(x)
        return out


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    shapes = (6, 4), (6, 2)
    return [
        (torch.randn(shapes[0], generator=draw).double(), torch.randn(shapes[1], generator=draw).double())
        for _ in range(STEPS)
    ]  # fmt: skip


Options = Callable[[str, int, int], dict[str, float]]
"""The options of a parameter of a name, with a number of axes, in a step counted from 0."""


def by_hand(options: Options, clip: float | None = None) -> dict[str, Tensor]:
    """Return the weights after a loop of AdamW written down from its definition."""
    net = Net().double()
    first = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for step, (x, y) in enumerate(batches()):
        gradients = torch.autograd.grad(nn.functional.mse_loss(net(x), y), list(net.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for (name, p), g in zip(net.named_parameters(), gradients, strict=True):
            o = {"b1": 0.9, "b2": 0.999, "decay": 0.0} | options(name, p.dim(), step)
            first[name] = o["b1"] * first[name] + (1 - o["b1"]) * scale * g
            second[name] = o["b2"] * second[name] + (1 - o["b2"]) * (scale * g).square()
            m = first[name] / (1 - o["b1"] ** (step + 1))
            v = second[name] / (1 - o["b2"] ** (step + 1))
            with torch.no_grad():
                p.mul_(1 - o["lr"] * o["decay"]).sub_(o["lr"] * m / (v.sqrt() + 1e-8))
    return {name: p.detach() for name, p in net.named_parameters()}


def trained(optimizer: str, more: str = "") -> dict[str, Tensor]:
    net = Net().double()
    program = trainc.compile(SPEC + f"optimizer adamw {{ {optimizer} }} {more}", net)
    for batch in batches():
        program.step(batch)
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-12, atol=1e-12, msg=name)


def depth(name: str) -> float:
    """Return the depth of a parameter: 0, 1/3 and 2/3 in the blocks, 1 in the head."""
    return 1.0 if name.startswith("head") else int(name.split(".")[1]) / 3


CASES: dict[str, tuple[str, Options]] = {
    "decay of the clock": (
        "lr = 0.05, weight_decay = 0.4 * linear(to = 0)",
        lambda name, axes, t: {"lr": 0.05, "decay": 0.4 * (1 - t / STEPS)},
    ),
    "decay by selector": (
        "lr = 0.05, weight_decay = [0.4 * linear() on ndim(2), 0.1 on ndim(1)]",
        lambda name, axes, t: {"lr": 0.05, "decay": 0.4 * (1 - t / STEPS) if axes == 2 else 0.1},
    ),
    "betas of the clock": (
        "lr = 0.05, betas = [0.9 - 0.4 * progress, 0.8 + 0.1 * linear()]",
        lambda name, axes, t: {
            "lr": 0.05,
            "b1": 0.9 - 0.4 * t / STEPS,
            "b2": 0.8 + 0.1 * (1 - t / STEPS),
        },
    ),
    "betas by selector": (
        'lr = 0.05, betas = [[0.5, 0.6] on "head.*", [0.9, 0.9 * linear(to = 0.5)] on "blocks.**"]',
        lambda name, axes, t: {"lr": 0.05, "b1": 0.5, "b2": 0.6}
        if name.startswith("head")
        else {"lr": 0.05, "b1": 0.9, "b2": 0.9 * (1 - t / STEPS / 2)},
    ),
    "rates by selector": (
        'lr = [0.02 on "blocks.**", 0.32 * linear() on "head.*"]',
        lambda name, axes, t: {
            "lr": 0.32 * (1 - t / STEPS) if name.startswith("head") else 0.02
        },
    ),
    "rates by place": (
        "lr = 0.05 * exp(depth - 1) * linear()",
        lambda name, axes, t: {"lr": 0.05 * math.exp(depth(name) - 1) * (1 - t / STEPS)},
    ),
    "rates by block": (
        'lr = [0.1 / (block + 1) on "blocks.**", 0.3 on "head.*"], weight_decay = 0.2 * depth',
        lambda name, axes, t: {
            "lr": 0.3 if name.startswith("head") else 0.1 / (3 * depth(name) + 1),
            "decay": 0.2 * depth(name),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_step_has_the_options_that_are_written(case: str) -> None:
    written, options = CASES[case]
    assert_same(trained(written), by_hand(options))


def test_one_clip_serves_all_rates_and_factors_multiply() -> None:
    """LoRA+ in one line, under one norm for all; a factor of a policy is on the rate of each."""
    written = 'lr = [0.01 on "blocks.**", 0.16 on "head.*"], clip = 0.2'
    found = trained(written, "lr by_type { factors = 0.5 on ndim(1) }")

    def options(name: str, axes: int, t: int) -> dict[str, float]:
        rate = 0.16 if name.startswith("head") else 0.01
        return {"lr": rate * (0.5 if axes == 1 else 1.0)}

    assert_same(found, by_hand(options, clip=0.2))


def test_constants_by_selector_are_those_of_two_optimizers() -> None:
    one = trained('lr = [0.01 on "blocks.**", 0.16 on "head.*"]')
    net = Net().double()
    two = 'optimizer adamw as a on "blocks.**" { lr = 0.01 } optimizer adamw as b on "head.*" { lr = 0.16 }'
    program = trainc.compile(SPEC + two, net)
    for batch in batches():
        program.step(batch)
    for name, weight in net.named_parameters():
        assert torch.equal(one[name], weight.detach())


MOVING = (
    'lr = [0.02 * linear() on "blocks.**", 0.1 on "head.*"], weight_decay = 0.3 * linear(),'
    " betas = [0.9, 0.9 * linear(to = 0.5)]"
)


def test_a_resumed_run_is_bit_equal() -> None:
    spec = SPEC + f"optimizer adamw {{ {MOVING} }}"
    whole, first, second = (trainc.compile(spec, Net().double()) for _ in range(3))
    for batch in batches():
        whole.step(batch)
    for batch in batches()[:4]:
        first.step(batch)
    second.module.load_state_dict(first.module.state_dict())
    second.load_state_dict(first.state_dict())
    for batch in batches()[4:]:
        second.step(batch)
    for a, b in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_moves_is_in_the_step_and_in_the_plan() -> None:
    program = trainc.compile(SPEC + f"optimizer adamw {{ {MOVING} }}", Net().double())
    metrics = program.step(batches()[0])
    assert metrics["adamw.weight_decay"] == pytest.approx(0.3)
    assert (metrics["adamw.beta1"], metrics["adamw.beta2"]) == pytest.approx((0.9, 0.9))
    assert (metrics["lr_min"], metrics["lr_max"]) == pytest.approx((0.02, 0.1))
    last = program.plan.schedules[-1]["values"]
    assert last['adamw lr on "blocks.**"'] == 0
    assert last['adamw lr on "head.*"'] == 0.1
    assert last["adamw weight_decay"] == 0
    assert last["adamw beta2"] == pytest.approx(0.45)
    rows = {row["name"]: row for row in program.plan.parameters}
    assert rows["head.bias"]["lr"] == "0.1"
    assert rows["blocks.0.bias"]["decay"] == "0.3 * linear()"


def test_a_beta_that_leaves_its_range_is_an_error_before_the_run_and_in_a_step() -> None:
    with pytest.raises(trainc.SpecError, match=r"`betas = 0.55 \+ progress`.* is 1.05 after 45%"):
        trained("lr = 0.1, betas = [0.9, 0.55 + progress]")
    with pytest.raises(ValueError, match=r"`betas = batch` of `optimizer adamw` is 6 in step 0"):
        trained("lr = 0.1, betas = [0.9, batch]")


def test_an_optimizer_of_another_name_takes_decays_that_move() -> None:
    spec = 'optimizer torch("torch.optim:AdamW") { lr = 0.05, weight_decay = 0.4 * linear() on ndim(2) }'
    net = Net().double()
    program = trainc.compile(SPEC + spec, net)
    for batch in batches():
        program.step(batch)
    found = {name: p.detach() for name, p in net.named_parameters()}
    assert_same(
        found,
        by_hand(lambda n, axes, t: {"lr": 0.05, "decay": 0.4 * (1 - t / STEPS) * (axes == 2)}),
    )


def test_a_plan_shows_constant_rates_and_factors_without_full(
    capsys: pytest.CaptureFixture[str],
) -> None:
    optimizer = 'optimizer adamw { lr = [0.01 on "blocks.**", 0.16 * linear() on "head.*"] }'
    factors = "lr layer_decay { decay = 0.5 } lr by_type { factors = 2 on ndim(1) }"
    print_plan(trainc.plan(SPEC + optimizer + factors, Net()), full=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert 'Constant in the whole run: adamw lr on "blocks.**" 0.01' in shown
    assert "layer_decay level 1..3 x0.125..0.5, by_type x2" in shown
    assert "0.16 * linear()" in shown
