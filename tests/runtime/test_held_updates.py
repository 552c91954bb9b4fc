"""Updates that are held back: what optimizers would add, exact for any weights, and added once."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.held_updates import DecayForm, HeldUpdates
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep, ParamSlot
from trainc.runtime.step.record import Step
from trainc.runtime.step.updates import Update, UpdateTransform

RATE, DECAY = 0.01, 0.1
Make = Callable[[Any], torch.optim.Optimizer]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=RATE)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=RATE, momentum=0.9)


KNOWN: list[tuple[Make, DecayForm]] = [(adamw, "decoupled"), (sgd, "coupled")]


class Multiply(UpdateTransform):
    """Multiplies updates by a number, and keeps copies of what it was given."""

    def __init__(self, *names: str, factor: float = 1.0, name: str = "multiply") -> None:
        self.name, self.parameters, self.factor = name, names, factor
        self.seen: list[dict[str, Update]] = []

    def change(self, updates: Sequence[Update], step: Step) -> None:
        self.seen.append({u.name: copy.deepcopy(u) for u in updates})
        for update in updates:
            update.change.mul_(self.factor)


class Failing(UpdateTransform):
    name, parameters = "failing", ("weight",)
    failing = True

    def change(self, updates: Sequence[Update], step: Step) -> None:
        if self.failing:
            raise ArithmeticError


def model(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(4, 3)
    with torch.no_grad():
        made.weight.mul_(scale)
    return made.to(dtype)


def machine(
    net: nn.Linear, make: Make, form: DecayForm | None, *transforms: UpdateTransform
) -> StepMachine:
    updates = HeldUpdates(transforms) if transforms else None
    named = dict(net.named_parameters())
    slots = [ParamSlot(name, p, DECAY if p.dim() > 1 else 0.0) for name, p in named.items()]
    actions = [OptimizerStep("optimizer", slots, make, form, updates), *transforms]
    return StepMachine([*actions, updates] if updates else actions, Clock(), named)


def gradients(net: nn.Linear, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def run(net: nn.Linear, by: StepMachine, steps: int = 4) -> list[Step]:
    done = []
    for seed in range(steps):
        by.begin()
        gradients(net, seed)
        done.append(by.finish())
    return done


@pytest.mark.parametrize(("make", "form"), [*KNOWN, (adamw, None), (sgd, None)])
def test_an_update_that_is_not_changed_is_the_optimizers(
    make: Make, form: DecayForm | None
) -> None:
    net, plain = model(), model()
    transform = Multiply("weight", "bias")
    run(net, machine(net, make, form, transform))
    run(plain, machine(plain, make, form))
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)
    assert [sorted(seen) for seen in transform.seen] == [["bias", "weight"]] * 4
    assert {u.lr for seen in transform.seen for u in seen.values()} == {RATE}


@pytest.mark.parametrize(("make", "form"), KNOWN)
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_an_update_is_as_exact_for_large_weights_as_for_small_ones(
    make: Make, form: DecayForm, scale: float
) -> None:
    single, double = model(torch.float32, scale), model(torch.float64, scale)
    with torch.no_grad():
        double.weight.copy_(single.weight)
        double.bias.copy_(single.bias)
    own, exact = Multiply("weight"), Multiply("weight")
    for net, seen in ((single, own), (double, exact)):
        run(net, machine(net, make, form, seen), 1)
    found, expected = own.seen[0]["weight"].change, exact.seen[0]["weight"].change
    error = ((found.double() - expected) / expected).abs().max()
    assert error < 5e-7


def test_a_difference_of_large_weights_is_not() -> None:
    single, seen = model(torch.float32, 1e6), Multiply("weight")

    def slow(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1e-6)

    weight = single.weight.detach().double()
    by = machine(single, slow, None, seen)
    gradients(single, 0)
    assert single.weight.grad is not None
    expected = -1e-6 * (single.weight.grad.double() + DECAY * weight)
    first, second = run(single, by, 2)
    error = ((seen.seen[0]["weight"].change.double() - expected) / expected).abs().max()
    assert error > 0.01
    note = (
        "multiply: this optimizer does not say how its updates depend on the weights, so they are differences of"
        " rounded weights, wrong by up to 6e-08 times each weight: use an optimizer"
        " that has a name in trainc for exact ones"
    )
    assert first.notes == [note]
    assert not second.notes


@pytest.mark.parametrize(("make", "form"), [*KNOWN, (adamw, None)])
def test_weights_stand_still_until_the_update_is_added(make: Make, form: DecayForm | None) -> None:
    net = model()
    storage = [p.data_ptr() for p in net.parameters()]
    before = copy.deepcopy(net.state_dict())
    transform = Multiply("weight", "bias", factor=0.0)
    run(net, machine(net, make, form, transform))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert [p.data_ptr() for p in net.parameters()] == storage
    assert all(torch.equal(transform.seen[-1][n].before, w) for n, w in before.items())


@pytest.mark.parametrize(("make", "form"), KNOWN)
def test_parameters_that_are_not_named_are_bit_equal_to_plain(make: Make, form: DecayForm) -> None:
    net, plain = model(), model()
    run(net, machine(net, make, form, Multiply("weight", factor=0.5)))
    run(plain, machine(plain, make, form))
    assert torch.equal(net.bias, plain.bias)
    assert not torch.equal(net.weight, plain.weight)


@pytest.mark.parametrize(("make", "form"), KNOWN)
def test_closed_gates_leave_every_bit(make: Make, form: DecayForm) -> None:
    net, plain = model(), model()
    transform = Multiply("weight", factor=0.5)
    transform.gate = Gate(start=TimeSpan(3, "steps"))
    by, plainly = machine(net, make, form, transform), machine(plain, make, form)
    run(net, by, 3)
    run(plain, plainly, 3)
    assert not transform.seen
    assert torch.equal(net.weight, plain.weight)
    run(net, by, 1)
    run(plain, plainly, 1)
    assert len(transform.seen) == 1
    assert not torch.equal(net.weight, plain.weight)


def test_transforms_run_one_after_the_other() -> None:
    net, once = model(), model()
    one, two = Multiply("weight", factor=0.5), Multiply("weight", factor=3.0, name="other")
    run(net, machine(net, adamw, "decoupled", one, two))
    run(once, machine(once, adamw, "decoupled", Multiply("weight", factor=1.5)))
    torch.testing.assert_close(net.weight, once.weight, rtol=1e-14, atol=0)
    assert torch.equal(two.seen[0]["weight"].change, one.seen[0]["weight"].change * 0.5)


@pytest.mark.parametrize(("make", "form"), KNOWN)
def test_a_parameter_without_a_gradient_is_left_out(make: Make, form: DecayForm) -> None:
    net, transform = model(), Multiply("weight", "bias")
    by, before = machine(net, make, form, transform), net.weight.detach().clone()
    by.begin()
    net.bias.grad = torch.ones_like(net.bias)
    by.finish()
    assert torch.equal(net.weight, before)
    assert list(transform.seen[0]) == ["bias"]


def test_an_error_leaves_the_weights_and_the_next_step_its_own_update() -> None:
    net, transform = model(), Failing()
    by, before = machine(net, sgd, "coupled", transform), net.weight.detach().clone()
    by.begin()
    gradients(net, 0)
    with pytest.raises(ArithmeticError):
        by.finish()
    assert torch.equal(net.weight, before)
    by.discard_step()
    transform.failing = False
    by.begin()
    net.bias.grad = torch.ones_like(net.bias)
    by.finish()
    assert torch.equal(net.weight, before)


def test_an_error_of_the_optimizer_leaves_the_weights() -> None:
    def broken(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD(groups, lr=RATE)
        made.step = lambda closure=None: 1 / 0  # type: ignore[method-assign]
        return made

    net = model()
    by, before = machine(net, broken, "coupled", Multiply("weight")), net.weight.detach().clone()
    by.begin()
    gradients(net, 0)
    with pytest.raises(ZeroDivisionError):
        by.finish()
    assert torch.equal(net.weight, before)


def test_layouts_are_kept() -> None:
    weight: Tensor = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    parameter = nn.Parameter(weight)
    transform = Multiply("weight")
    updates = HeldUpdates([transform])
    slots = [ParamSlot("weight", parameter, 0.1)]
    step = OptimizerStep("optimizer", slots, adamw, "decoupled", updates)
    by = StepMachine([step, transform, updates], Clock(), {"weight": parameter})
    by.begin()
    parameter.grad = torch.randn_like(parameter)
    by.finish()
    assert transform.seen[0]["weight"].change.stride() == weight.stride()
    assert parameter.stride() == weight.stride()
