"""L2-SP: the published value, its gradient, and a start that survives a resume."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.regularize.weights.l2_sp import L2Sp
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.term import Forward
from trainc.compiler.model.inventory import build_inventory
from trainc.dsl.values import value_json as v
from trainc.runtime.companion.start import Anchors
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep, ParamSlot
from trainc.runtime.step.record import Signals

REFERENCE = Path(__file__).parents[2] / "reference/regularizers.json"


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4), nn.Linear(4, 3, bias=False))
    for i, parameter in enumerate(made.parameters()):
        parameter.data = grid(parameter.shape, 0.6, 0.7 * i)
    return made.to(dtype)


def grid(shape: Sequence[int], scale: float, phase: float) -> Tensor:
    """Return the reference file's numbers: sin(1.7 i + 0.3 + phase) * scale, float32."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(1.7 * i + 0.3 + phase) * scale).float().view(*shape)


def l2_sp(weight: Any, **fields: Any) -> L2Sp:
    """Return the clause; a number stands for a constant schedule."""
    return L2Sp(weight=weight, **fields)


def lower(
    made: nn.Module, rule: L2Sp, start: v.Duration | None = None
) -> tuple[LoweredMethod, Anchors, tuple[str, ...]]:
    context = LoweringContext(
        made, build_inventory(made), UnitConversion(8), RunLength(100, "steps"), Signals()
    )
    lowered = LoweredMethod()
    names = ("0.weight", "1.weight", "2.weight")
    bound = None if start is None else TimeSpan(start.amount, start.unit)
    rule.lower(Lowering(BoundClause(rule, "l2_sp", names, bound), context, lowered))
    (action,) = lowered.actions
    assert isinstance(action, Anchors)
    return lowered, action, names


def penalty(lowered: LoweredMethod, made: nn.Module, clock: Clock | None = None) -> Tensor:
    """Return the loss term as a program computes it."""
    term = lowered.rewrite.terms["l2_sp"]
    now, dtype = clock or Clock(), torch.float64
    scalars = {k: torch.tensor(s(now), dtype=dtype) for k, s in lowered.scalars.items()}
    nothing, parameters = torch.zeros(0), dict(made.named_parameters())
    tensors = {**scalars, **lowered.tensors}
    return term.evaluate(Forward(nothing, nothing, nothing, 1, parameters, tensors))


def test_the_value_is_the_published_one() -> None:
    row = json.loads(REFERENCE.read_text())["relatives"]["l2sp"]
    made = model(torch.float32)
    lowered, *_ = lower(made, l2_sp(weight=row["alpha"]))
    assert float(penalty(lowered, made).detach()) == 0.0
    for parameter in made.parameters():
        if parameter.dim() == 2:
            parameter.data += grid(parameter.shape, 0.1, 2.0)
    assert float(penalty(lowered, made).detach()) == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.parametrize("to", ["start", "zero"])
def test_the_gradient_is_the_weighted_distance(to: str) -> None:
    made = model()
    lowered, _, names = lower(made, l2_sp(weight=0.03, to=to))
    starts = {n: made.get_parameter(n).detach().clone() for n in names}
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    penalty(lowered, made).backward()
    for name in names:
        parameter = made.get_parameter(name)
        apart = parameter.detach() - (starts[name] if to == "start" else 0)
        torch.testing.assert_close(parameter.grad, 0.03 * apart, rtol=1e-12, atol=1e-15)
    assert made.get_parameter("1.bias").grad is None
    assert sorted(lowered.tensors) == ([f"l2_sp:start:{n}" for n in names] if to == "start" else [])


def test_the_weight_follows_the_clock_and_the_clause() -> None:
    made = model()
    ramp = v.Binary("*", v.Number(0.01), v.Name("steps"))
    lowered, *_ = lower(made, l2_sp(weight=ramp), start=v.Duration(3, "steps"))
    (weight,) = lowered.scalars.values()
    assert [weight(Clock(steps=t)) for t in range(5)] == [0.0, 0.0, 0.0, 0.03, 0.04]
    open_at = [list(lowered.rewrite.at(Clock(steps=t)).terms) for t in range(5)]
    assert open_at == [[], [], [], ["l2_sp"], ["l2_sp"]]


def test_what_is_frozen_is_left_out() -> None:
    made = model()
    made.get_parameter("1.weight").requires_grad_(False)
    lowered, *_ = lower(made, l2_sp(weight=1.0))
    penalty(lowered, made).backward()
    assert [n for n, p in made.named_parameters() if p.grad is not None] == ["0.weight", "2.weight"]
    made.requires_grad_(False)
    inventory = build_inventory(made)
    (problem,) = l2_sp(weight=1.0).validate_targets(Targets(inventory, (), inventory.parameters))
    assert problem.rule == "selector-matches-frozen"


def test_half_precision_weights_are_summed_in_float32() -> None:
    made = model(torch.bfloat16)
    lowered, *_ = lower(made, l2_sp(weight=2.0))
    for parameter in made.parameters():
        parameter.data += 0.01
    value = penalty(lowered, made)
    assert value.dtype != torch.bfloat16
    assert float(value.detach()) > 0


def test_complex_weights_have_the_distance_of_their_parts() -> None:
    weight = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
    start = torch.randn_like(weight)
    value = L2Sp.reference({"w": weight}, {"w": start}, 0.3)
    assert float(value.detach()) == pytest.approx(
        0.15 * float((weight - start).detach().abs().square().sum())
    )
    value.backward()
    torch.testing.assert_close(weight.grad, 0.3 * (weight - start).detach())


def test_the_start_survives_a_resume() -> None:
    def machine(made: nn.Module) -> tuple[LoweredMethod, StepMachine]:
        lowered, _, _ = lower(made, l2_sp(weight=0.5))
        slots = [ParamSlot(name, p, 0.0) for name, p in made.named_parameters()]
        optimizer = OptimizerStep("sgd", slots, lambda groups: torch.optim.SGD(groups, lr=0.1))
        return lowered, StepMachine(
            [*lowered.actions, optimizer], Clock(), dict(made.named_parameters())
        )

    def run(made: nn.Module, lowered: LoweredMethod, steps: StepMachine, count: int) -> None:
        for _ in range(count):
            steps.begin()
            x = grid((8, 6), 1.0, float(steps.clock.steps)).double()
            (made(x).square().mean() + penalty(lowered, made)).backward()
            steps.finish()

    whole = model()
    lowered, steps = machine(whole)
    run(whole, lowered, steps, 3)
    state, weights = steps.state_dict(), {k: t.clone() for k, t in whole.state_dict().items()}
    state["actions"]["l2_sp"] = {k: t.clone() for k, t in state["actions"]["l2_sp"].items()}
    run(whole, lowered, steps, 3)

    resumed = model()
    for parameter in resumed.parameters():
        parameter.data.add_(1.0)
    lowered, steps = machine(resumed)
    resumed.load_state_dict(weights)
    steps.load_state_dict(state)
    run(resumed, lowered, steps, 3)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))


def test_a_clause_added_on_resume_starts_there() -> None:
    made = model()
    lowered, action, names = lower(made, l2_sp(weight=1.0))
    for parameter in made.parameters():
        parameter.data += 1.0
    assert float(penalty(lowered, made).detach()) > 0
    action.load_state_dict({})
    assert float(penalty(lowered, made).detach()) == 0.0
    with pytest.raises(ValueError, match=r"they differ in 1.weight, 2.weight"):
        action.load_state_dict({names[0]: torch.zeros(5, 6)})


def test_the_summary_says_how_far_the_weights_went() -> None:
    made = model()
    _, action, _ = lower(made, l2_sp(weight=1.0))
    made.get_parameter("0.weight").data[0, 0] += 3.0
    assert action.summary() == "l2_sp: the weights ended 3 from their start"
    assert lower(made, l2_sp(weight=1.0, to="zero"))[1].state_dict() == {}


def test_no_weight_is_no_effect() -> None:
    assert l2_sp(weight=0).identity_setting()
    assert not l2_sp(weight=0.1).identity_setting()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the penalty and its gradient two steps from the start, by the program and by definition."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    spec = "loss mse optimizer sgd { lr = 0.3 } regularize l2_sp on all { weight = 0.7 }"
    program = trainc.compile(spec, model, executor="module")
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        program.step((x, y))
    named = dict(model.named_parameters())
    penalty = program.loss((x, y)) - torch.nn.functional.mse_loss(model(x), y)
    wanted = L2Sp.reference(named, start, 0.7)
    results = []
    for value in (penalty, wanted):
        found = torch.autograd.grad(value, list(named.values()))
        results.append({"penalty": value.detach(), **dict(zip(named, found, strict=True))})
    return results[0], results[1]
