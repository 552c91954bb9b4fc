"""AlphaDecay: the factors of TempBalance, on the weight decay of an optimizer."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.lr.alpha_decay import AlphaDecay
from trainc.compiler.program.program import Program
from trainc.dsl.text.render import render_text
from trainc.runtime.step.optimizer import OptimizerStep

ADAMW = "loss mse optimizer adamw { lr = 1e-2, weight_decay = 0.1 * cosine(over = 20 steps) on ndim(2) }\n"
CLAUSE = "lr alpha_decay on ndim(2) every 3 steps { shrink = false, min_eigenvalues = 8 }"


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in pairwise([24, 32, 24, 40, 20])]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.mul_(torch.rand(layer.in_features).pow(i))
    return nn.Sequential(*layers).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(6, n, dtype=torch.float64, generator=random) for n in (24, 20))  # type: ignore[return-value]


def decays(program: Program) -> dict[str, float]:
    """Return the weight decay of each parameter in the last step."""
    (step,) = (a for a in program.execution.method.actions if isinstance(a, OptimizerStep))
    return {s.name: o["weight_decay"] for _, o, slots in step.in_groups() for s in slots}


def test_decays_are_the_schedule_times_factors_and_rates_are_left_alone() -> None:
    model = net()
    weights = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if p.ndim == 2}
    factors = AlphaDecay(shrink=False, min_eigenvalues=8).reference(weights)
    assert sorted(factors.values())[::3] == pytest.approx([0.67, 3.0])
    program = trainc.compile(ADAMW + CLAUSE, model)
    for i in range(3):
        metrics = program.step(data(i))
        base = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * i / 20)).item()) / 2
        found = decays(program)
        assert {found[f"{n}.bias"] for n in factors} == {0.0}
        want = {f"{name}.weight": base * factor for name, factor in factors.items()}
        assert {n: found[n] for n in want} == pytest.approx(want, rel=1e-3)
        assert metrics["lr_min"] == metrics["lr_max"] == 1e-2
    assert set(decays(program).values()) != {0.0}


def test_a_resumed_run_decays_alike() -> None:
    program, fresh = (trainc.compile(ADAMW + CLAUSE, net()) for _ in range(2))
    for i in range(5):
        program.step(data(i))
    fresh.module.load_state_dict(program.module.state_dict())
    fresh.load_state_dict(copy.deepcopy(program.state_dict()))
    for i in range(5, 8):
        program.step(data(i))
        fresh.step(data(i))
        assert decays(fresh) == decays(program)
    for name, p in program.module.named_parameters():
        assert torch.equal(p, fresh.module.get_parameter(name))


def test_the_plan_says_where_which_factors_go() -> None:
    plan = trainc.compile(ADAMW + CLAUSE, net()).plan
    rows = {row["name"]: row for row in plan.parameters}
    assert rows["0.weight"]["decay_factors"] == ["alpha_decay"]
    assert rows["0.weight"]["decay_values"] == ["0.67..3"]
    assert rows["0.weight"]["lr_factors"] == rows["0.bias"]["decay_factors"] == []


@pytest.mark.parametrize("decay", ["", ", weight_decay = 0.1 on ndim(1)"])
def test_a_selection_that_does_not_decay_is_an_error(decay: str) -> None:
    with pytest.raises(trainc.SpecError) as caught:
        trainc.compile(f"loss mse optimizer adamw {{ lr = 1e-2{decay} }}\n{CLAUSE}", net())
    assert "none of the parameters that it selects decays" in render_text(caught.value.diagnostics)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after one step of decoupled decay at rate 0.1, by the program and from singular values."""
    model = net()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fields: dict[str, Any] = {"min_eigenvalues": 8, "fit": "dks", "map": "log2"}
    text = ", ".join(f"{name} = {value}" for name, value in fields.items())
    spec = "loss mse optimizer adamw { lr = 0.1, weight_decay = 0.5 on ndim(2) }"
    program = trainc.compile(f"{spec} lr alpha_decay on ndim(2) {{ {text} }}", model)
    program.loss(data(0)).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    program.update()
    weights = {n.removesuffix(".weight"): p for n, p in start.items() if p.ndim == 2}
    factors = AlphaDecay(**fields).reference(weights)
    reference = {}
    for name, w in start.items():
        decay = 0.5 * factors[name.removesuffix(".weight")] if w.ndim == 2 else 0.0
        g = gradients[name]
        reference[name] = w * (1 - 0.1 * decay) - 0.1 * g / (g.abs() + 1e-8)
    return {name: p.detach() for name, p in model.named_parameters()}, reference
