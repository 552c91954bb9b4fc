"""Rates that grow with the batch, against the two rules and beside other policies."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.constructs.lr.batch_scaling import BatchScaling
from trainc.compiler.program.program import Program
from trainc.runtime.step.optimizer import OptimizerStep

DATA = 'data "examples.data:stdlib" {{ batch = {batch}, micro = 2 samples, context = 8 }}\n'
BASE = "loss cross_entropy\noptimizer {optimizer} {{ lr = 1e-2 }}\nrun {{ length = 400 samples }}\n"


def net() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=11).double()


def examples(count: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 11, (count, 9), generator=torch.Generator().manual_seed(count))
    return ids[:, :-1], ids[:, 1:]


def ramped(clauses: str, optimizer: str = "sgd") -> Program:
    """Return a program whose batch goes from 4 to 16 samples over 100."""
    data = DATA.format(batch="ramp(4 samples, to = 16 samples, over = 100 samples)")
    return trainc.compile(BASE.format(optimizer=optimizer) + data + clauses, net())


def run(program: Program, steps: int) -> list[tuple[int, float]]:
    """Return the batch and the rate of each step."""
    found = []
    for _ in range(steps):
        program.begin()
        rate = program.step(examples(program.batch_size))["lr_max"]
        found.append((program.batch_size, rate))
    return found


@given(st.sampled_from(["sqrt", "linear"]), st.integers(1, 10**5), st.floats(0.5, 1e5))
def test_the_factor_is_the_definition(
    rule: Literal["sqrt", "linear"], batch: int, reference: float
) -> None:
    construct = BatchScaling(rule=rule)
    expected = construct.by_definition(batch, reference)
    assert construct.factor(batch, reference) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rule", "power"), [("sqrt", 0.5), ("linear", 1.0)])
def test_every_step_has_the_rate_of_its_own_batch(rule: str, power: float) -> None:
    found = run(ramped(f"lr batch_scaling {{ rule = {rule} }}"), 16)
    sizes = [batch for batch, _ in found]
    assert sizes[0] == 4
    assert sizes[-1] == 16
    assert len(set(sizes)) > 4
    for batch, rate in found:
        assert rate == pytest.approx(1e-2 * (batch / 4) ** power, rel=1e-12)


def test_the_reference_has_the_rate_that_is_written() -> None:
    found = run(ramped("lr batch_scaling { reference = 16 samples }"), 16)
    assert found[0][1] == pytest.approx(1e-2 / 2)
    assert found[-1] == (16, 1e-2)


def test_it_multiplies_with_other_policies_and_spares_what_is_not_selected() -> None:
    program = ramped('lr batch_scaling on "blocks.**"\nlr layer_decay { decay = 0.5 }', "adamw")
    run(program, 16)
    rates = {
        slot.name: group["lr"]
        for action in program._method.actions
        if isinstance(action, OptimizerStep)
        for ours, group in zip(action.groups, action.torch.param_groups, strict=True)
        for slot in ours
    }
    head = next(name for name in rates if name.startswith(("head", "norm")))
    assert rates[head] == 1e-2
    last = next(name for name in rates if name.startswith("blocks.1."))
    assert rates[last] == pytest.approx(1e-2 * 0.5 * math.sqrt(16 / 4))


def test_without_data_the_batch_is_what_is_given() -> None:
    spec = BASE.format(optimizer="sgd") + "lr batch_scaling { reference = 4 samples }"
    program = trainc.compile(spec, net())
    assert program.step(examples(16))["lr_max"] == pytest.approx(2e-2)
    assert program.step([examples(3), examples(6)])["lr_max"] == pytest.approx(1.5e-2)
    for _ in range(4):
        program.loss(examples(4), loss_weight=0.25).backward()
    assert program.update()["lr_max"] == pytest.approx(2e-2)
    assert program.step(examples(4))["lr_max"] == pytest.approx(1e-2)


def test_without_data_it_needs_a_reference_and_a_batch() -> None:
    with pytest.raises(trainc.SpecError, match=r"reference = 32 samples"):
        trainc.compile(BASE.format(optimizer="sgd") + "lr batch_scaling", net())
    spec = BASE.format(optimizer="sgd") + "lr batch_scaling { reference = 4 samples }"
    with pytest.raises(ValueError, match="needs the batch size of this step"):
        trainc.compile(spec, net()).begin()


def warnings(batch: str, clause: str, rule: str = "") -> list[str]:
    text = BASE.format(optimizer="sgd") + DATA.format(batch=batch) + clause + rule
    return [warning.rule for warning in trainc.plan(text, net()).warnings]


def test_a_batch_that_never_changes_is_told_to_have_no_effect() -> None:
    assert warnings("4 samples", "lr batch_scaling") == ["no-effect"]
    assert warnings("4 samples", "lr batch_scaling { reference = 4 samples }") == ["no-effect"]
    assert warnings("4 samples", "lr batch_scaling { reference = 8 samples }") == []
    assert warnings("4 samples", "lr batch_scaling", "\nwhen loss < 1 { batch = 8 samples }") == []
    assert warnings("ramp(4 samples, to = 8 samples, over = 50%)", "lr batch_scaling") == []


@pytest.mark.parametrize("wrong", ["0 samples", "32 tokens"])
def test_the_reference_is_an_amount_of_samples(wrong: str) -> None:
    with pytest.raises(ValidationError, match="32 samples"):
        BatchScaling(reference=wrong)  # type: ignore[arg-type]


def test_a_clause_with_a_window_is_refused() -> None:
    with pytest.raises(trainc.SpecError, match="whole run"):
        ramped("lr batch_scaling every 5 steps")


def test_its_summary_says_what_it_did() -> None:
    program = ramped("lr batch_scaling { rule = linear }")
    run(program, 16)
    lines = program.summary()
    assert "batch_scaling: factors 1 to 4, batches from 4 to 16 samples" in lines
    assert any(line.startswith("data: batch changed 6 times, 4 -> 16 samples") for line in lines)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after three SGD steps over a growing batch, by the program and by definition."""
    sizes, model, copy = (4, 8, 16), net(), net()
    spec = BASE.format(optimizer="sgd") + "lr batch_scaling { reference = 6 samples }"
    program = trainc.compile(spec, model)
    construct = BatchScaling()
    for size in sizes:
        inputs, targets = examples(size)
        program.step((inputs, targets))
        copy.zero_grad()
        loss = nn.functional.cross_entropy(copy(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        with torch.no_grad():
            for weight in copy.parameters():
                if weight.grad is not None:
                    weight.sub_(weight.grad, alpha=1e-2 * construct.by_definition(size, 6))
    return (
        {name: p.detach() for name, p in model.named_parameters()},
        {name: p.detach() for name, p in copy.named_parameters()},
    )


HELD = (
    "lr batch_scaling {{ rule = {rule}, reference = 4 samples, beta2 = half_life, decay = linear }}"
)
SIZES = (4, 4, 4, 8, 16, 16, 6, 4, 12)


def adam_by_hand(rule: str, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return weights after AdamW whose average of squares forgets by samples, written down from its definition.

    `u` is the average with its bias corrected. It keeps its value where beta2 changes, and a new square has the weight
    that it would have had if every step had had the beta2 of now.
    """
    model, power = net(), {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[rule]
    names = dict(model.named_parameters())
    m = {n: torch.zeros_like(p) for n, p in names.items()}
    u = {n: torch.zeros_like(p) for n, p in names.items()}
    for t, size in enumerate(sizes, 1):
        inputs, targets = examples(size)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        k = size / 4
        lr, b2 = 1e-2 * k**power, 0.9**k
        decay = 0.2 * k / k**power
        for (name, p), g in zip(names.items(), found, strict=True):
            if g is None:
                continue
            m[name] = 0.8 * m[name] + 0.2 * g
            u[name] = u[name] + (1 - b2) / (1 - b2**t) * (g.square() - u[name])
            with torch.no_grad():
                p.mul_(1 - lr * decay).sub_(lr * m[name] / (1 - 0.8**t) / (u[name].sqrt() + 1e-6))
    return {name: p.detach() for name, p in model.named_parameters()}


def held(
    rule: str, optimizer: str = "adamw { lr = 1e-2, betas = [0.8, 0.9], weight_decay = 0.2 }"
) -> Program:
    spec = f"loss cross_entropy\noptimizer {optimizer}\nrun {{ length = 400 samples }}\n"
    return trainc.compile(spec + HELD.format(rule=rule), net())


@pytest.mark.parametrize("rule", ["sqrt", "linear", "none"])
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw { lr = 1e-2, betas = [0.8, 0.9], weight_decay = 0.2, eps = 1e-6 }",
        'torch("torch.optim:AdamW") { lr = 1e-2, betas = [0.8, 0.9], weight_decay = 0.2, eps = 1e-6 }',
    ],
)
def test_half_life_and_decay_are_held_in_samples(rule: str, optimizer: str) -> None:
    program = held(rule, optimizer)
    for size in SIZES:
        program.step(examples(size))
    expected = adam_by_hand(rule, SIZES)
    for name, weight in program.module.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_a_batch_that_stays_is_the_run_without_it_bit_for_bit() -> None:
    plain = "adamw { lr = 1e-2, betas = [0.8, 0.9], weight_decay = 0.2 }"
    without = trainc.compile(
        f"loss cross_entropy optimizer {plain} run {{ length = 9 steps }}", net()
    )
    program = held("sqrt", plain)
    for _ in range(4):
        metrics = program.step(examples(4))
        without.step(examples(4))
    assert (metrics["adamw.beta2"], metrics["adamw.weight_decay"]) == (0.9, 0.2)
    for a, b in zip(program.module.parameters(), without.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_holds_them_bit_for_bit() -> None:
    whole, first, second = (held("sqrt") for _ in range(3))
    for size in SIZES:
        whole.step(examples(size))
    for size in SIZES[:5]:
        first.step(examples(size))
    second.module.load_state_dict(first.module.state_dict())
    second.load_state_dict(first.state_dict())
    for size in SIZES[5:]:
        second.step(examples(size))
    for a, b in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_held_is_in_the_step_and_in_the_plan() -> None:
    """The half-life in samples, and batch / (rate * decay), are those of the reference."""
    spec = BASE.format(optimizer="adamw").replace(
        "{ lr = 1e-2 }", "{ lr = 1e-2, betas = [0.8, 0.9], weight_decay = 0.2 }"
    )
    data = DATA.format(batch="ramp(4 samples, to = 16 samples, over = 100 samples)")
    program = trainc.compile(spec + data + HELD.format(rule="sqrt"), net())
    last = program.plan.schedules[-1]["values"]
    assert last["batch"] == 16
    assert last["adamw beta2"] == pytest.approx(0.9**4)
    assert last["adamw weight_decay"] == pytest.approx(0.2 * 4 / 2)
    assert last["batch_scaling x"] == 2
    for _ in range(16):
        program.begin()
        size = program.batch_size
        metrics = program.step(examples(size))
        half_life = math.log(0.5) / math.log(metrics["adamw.beta2"]) * size
        assert half_life == pytest.approx(math.log(0.5) / math.log(0.9) * 4)
        timescale = size / (metrics["lr_max"] * metrics["adamw.weight_decay"])
        assert timescale == pytest.approx(4 / (1e-2 * 0.2))


def test_the_summary_says_what_was_held() -> None:
    program = held("sqrt")
    for size in (4, 16):
        program.step(examples(size))
    line = next(line for line in program.summary() if line.startswith("batch_scaling"))
    assert line.endswith("held in samples: the half-life of squares and the timescale of decay")


def test_a_half_life_needs_a_second_moment() -> None:
    with pytest.raises(trainc.SpecError, match=r"`optimizer sgd`, which trains .* has none"):
        held("sqrt", "sgd { lr = 1e-2 }")


def test_the_timescale_of_decay_needs_decay() -> None:
    with pytest.raises(trainc.SpecError, match=r"scales weight decay, and none of the parameters"):
        warnings("4 samples", "lr batch_scaling { reference = 8 samples, decay = linear }")


def test_scaling_nothing_is_told() -> None:
    assert warnings("4 samples", "lr batch_scaling { rule = none, reference = 8 samples }") == [
        "no-effect"
    ]
