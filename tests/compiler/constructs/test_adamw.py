"""AdamW and what all optimizer clauses share: the update by definition, decay per selector, clipping, claims."""

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.optimizer.adamw import AdamW
from trainc.dsl.values.value_json import Number

DATA = [
    (torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64))
    for _ in range(6)
]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after six updates, by the program and by definition from the gradients it met."""
    model = linear()
    start = model.weight.detach().clone()
    spec = "loss mse optimizer adamw { lr = 0.1, weight_decay = 0.2, betas = [0.8, 0.9] }"
    program = trainc.compile(spec, model)
    gradients = []
    for batch in DATA:
        program.loss(batch).backward()
        assert model.weight.grad is not None
        gradients.append(model.weight.grad.clone())
        program.update()
    reference = AdamW(lr=Number(0.1)).reference(start, gradients, 0.1, 0.2, (0.8, 0.9))
    return {"weight": model.weight.detach()}, {"weight": reference}


def test_decay_acts_where_it_is_said() -> None:
    model = linear()
    bias = model.bias.detach().clone()
    spec = "loss mse optimizer adamw { lr = 0.1, weight_decay = 0.5 on ndim(2) }"
    program = trainc.compile(spec, model)
    rows = {row["name"]: row["decay"] for row in program.plan.parameters}
    assert rows == {"weight": 0.5, "bias": 0.0}
    x = torch.zeros(2, 4, dtype=torch.float64)
    before = model.weight.detach().clone()
    program.step((x, model(x).detach()))
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), bias)


def test_clipping_is_the_last_gradient_step() -> None:
    one, two = linear(), linear()
    program = trainc.compile("loss mse optimizer sgd { lr = 1, clip = 0.01 }", one)
    metrics = program.step(DATA[0])
    loss = torch.nn.functional.mse_loss(two(DATA[0][0]), DATA[0][1])
    loss.backward()
    norm = nn.utils.clip_grad_norm_(two.parameters(), 0.01)
    assert metrics["gradient_norm"] == pytest.approx(float(norm))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(a.detach(), b.detach() - b.grad)


def test_two_optimizers_share_a_model_without_overlap() -> None:
    model = linear()
    spec = """loss mse
    optimizer adamw on "weight" { lr = 0.1 }
    optimizer sgd on "bias" { lr = 0.5 }"""
    program = trainc.compile(spec, model)
    assert {r["name"]: r["optimizer"] for r in program.plan.parameters} == {
        "weight": "adamw",
        "bias": "sgd",
    }
    program.step(DATA[0])


def test_a_parameter_claimed_twice_is_an_error_with_both_lines() -> None:
    spec = 'loss mse\noptimizer adamw on "weight" { lr = 0.1 }\noptimizer sgd { lr = 0.5 }'
    with pytest.raises(trainc.SpecError) as caught:
        trainc.compile(spec, linear())
    (found,) = [d for d in caught.value.diagnostics if d.rule == "claimed-twice"]
    assert [label.span.source.position(label.span.start)[0] for label in found.labels] == [3, 2]


def test_a_parameter_nobody_trains_is_an_error_unless_frozen() -> None:
    spec = 'loss mse optimizer adamw on "weight" { lr = 0.1 }'
    with pytest.raises(trainc.SpecError, match="bias"):
        trainc.compile(spec, linear())
    model = linear()
    trainc.compile('loss mse optimizer adamw on "weight" { lr = 0.1, freeze = "bias" }', model)
    assert not model.bias.requires_grad


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_torchs_implementations_can_be_chosen(implementation: str) -> None:
    models = [linear(), linear()]
    for model, choice in zip(models, ("auto", implementation), strict=True):
        spec = f"loss mse optimizer adamw {{ lr = 0.1, implementation = {choice} }}"
        program = trainc.compile(spec, model)
        for batch in DATA:
            program.step(batch)
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_state_is_kept_by_name_not_by_position() -> None:
    first = 'loss mse optimizer adamw as a on "weight" { lr = 0.1 } optimizer adamw as b on "bias" { lr = 0.2 }'
    program = trainc.compile(first, linear())
    for batch in DATA:
        program.step(batch)
    state = program.state_dict()["actions"]
    assert {path for path in state["a"] if path.startswith("weight/")} == set(state["a"])
    assert state["a"]["weight/exp_avg"].shape == (3, 4)
