"""The batch that grows where the rate falls: `seesaw`, against its definition and a loop by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.program.program import Program

RATE = 0.1
SPEC = """loss mse
data "examples.data:stdlib" {{ batch = {batch}, micro = 2 samples, context = 8 }}
optimizer adamw {{ lr = {lr}, betas = [0.8, 0.9] }}
run {{ length = 200 samples }}
"""
FALLING = f"{RATE} * (warmup(20%) then linear(to = 0))"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2).double()


def examples(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, generator=draw).double(), torch.randn(
        count, 2, generator=draw
    ).double()


def program(batch: str = "seesaw(max = 16 samples, min = 4 samples)", lr: str = FALLING) -> Program:
    return trainc.compile(SPEC.format(batch=batch, lr=lr), net())


def scheduled(samples: int) -> float:
    """Return the rate that the schedule writes: a warm-up over 40 samples, then a line to zero at 200."""
    return RATE * ((samples + 4) / 40 if samples < 40 else 1 - (samples - 40) / 160)


def run(made: Program, steps: int) -> list[tuple[int, float]]:
    found = []
    for _ in range(steps):
        made.begin()
        size = made.batch_size
        found.append((size, made.step(examples(size))["lr_max"]))
    return found


def by_definition() -> list[tuple[int, float]]:
    """Return batch and rate of each step: the cut of the schedule is shared by both, sqrt(batch) times."""
    samples, highest, found = 0, 0.0, []
    while samples < 200:
        rate = scheduled(samples)
        highest = max(rate, highest)
        size = min(math.floor(4 * highest / rate / 2 + 1e-9) * 2, 16)
        found.append((size, rate * math.sqrt(size / 4)))
        samples += size
    return found


def test_every_step_has_the_batch_and_rate_of_the_definition_and_adam_steps_by_them() -> None:
    """Against a loop of Adam by hand in float64."""
    made = program()
    expected = by_definition()
    found = run(made, len(expected))
    assert [size for size, _ in found] == [size for size, _ in expected]
    assert [rate for _, rate in found] == pytest.approx([rate for _, rate in expected], rel=1e-12)
    assert {4, 6, 8, 16} <= {size for size, _ in found}
    assert found[-1][0] == 16
    weight = net()
    m = [torch.zeros_like(p) for p in weight.parameters()]
    v = [torch.zeros_like(p) for p in weight.parameters()]
    for t, (size, rate) in enumerate(expected, 1):
        x, y = examples(size)
        gradients = torch.autograd.grad(
            nn.functional.mse_loss(weight(x), y), [*weight.parameters()]
        )
        for i, (p, g) in enumerate(zip(weight.parameters(), gradients, strict=True)):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g.square()
            step = m[i] / (1 - 0.8**t) / ((v[i] / (1 - 0.9**t)).sqrt() + 1e-8)
            p.data.sub_(step, alpha=rate)
    for a, b in zip(made.module.parameters(), weight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_below_the_largest_batch_the_rate_is_the_root_of_the_cut_but_for_whole_micro_batches() -> (
    None
):
    made, samples = program(), 0
    for size, rate in run(made, len(by_definition())):
        highest = max(map(scheduled, range(0, samples + 1, 4)))
        root = RATE * math.sqrt(scheduled(samples) / highest) * highest / RATE
        assert root * math.sqrt(size / (size + 2)) < rate <= root * (1 + 1e-9) or size == 16
        samples += size


def test_a_resumed_run_is_bit_equal() -> None:
    whole, first, second = program(), program(), program()
    run(whole, 34)
    run(first, 27)
    second.module.load_state_dict(first.module.state_dict())
    second.load_state_dict(first.state_dict())
    run(second, 7)
    assert second.batch_size == whole.batch_size > 4
    for a, b in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_life_and_decay_are_held_under_it() -> None:
    spec = SPEC.format(batch="seesaw(max = 16 samples, min = 4 samples)", lr=FALLING)
    clause = "lr batch_scaling { rule = none, beta2 = half_life }"
    made = trainc.compile(spec + clause, net())
    for _ in range(34):
        made.begin()
        size = made.batch_size
        metrics = made.step(examples(size))
        assert metrics["adamw.beta2"] == pytest.approx(0.9 ** (size / 4), rel=1e-12)
    assert size > 4


@pytest.mark.parametrize(
    ("batch", "lr", "more", "message"),
    [
        (
            "seesaw(max = 16 samples, min = 4 samples)",
            "0.1",
            "",
            "learning rate falls, which is constant",
        ),
        ("seesaw(max = 2 samples)", FALLING, "", "stays at 2 samples"),
        ("seesaw(16 samples)", FALLING, "", "no argument"),
        ("seesaw(min = 4 samples)", FALLING, "", "needs `max`"),
        ("seesaw(max = 17 samples)", FALLING, "", "multiple of the micro-batch"),
        (
            "seesaw(max = 16 samples)",
            FALLING,
            "lr batch_scaling { rule = sqrt }",
            "both scale the learning rate",
        ),
        (
            "seesaw(max = 16 samples)",
            FALLING,
            "when loss < 1 { batch = 8 samples }",
            "both set `batch`",
        ),
    ],
)
def test_what_cannot_be_meant_is_a_located_error(
    batch: str, lr: str, more: str, message: str
) -> None:
    with pytest.raises(trainc.SpecError, match=message) as caught:
        trainc.compile(SPEC.format(batch=batch, lr=lr) + more, net())
    assert all(found.span is not None for found in caught.value.diagnostics)


def test_without_an_optimizer_of_the_spec_it_is_an_error() -> None:
    spec = 'loss mse data "examples.data:stdlib" { batch = seesaw(max = 16 samples), micro = 2 samples, context = 8 }'
    with pytest.raises(trainc.SpecError, match="the spec has none"):
        trainc.compile(spec, net())


def test_the_plan_says_what_sets_batch_and_rate() -> None:
    plan = program().plan
    assert plan.settings["batch"]["set_by"].startswith("seesaw(")
    assert "the learning rate" in plan.settings["batch"]["notes"][-1]
    assert [row["action"] for row in plan.steps if row["clause"] == "data"][1] == (
        "scale the rates with the batch"
    )
