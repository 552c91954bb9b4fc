"""Wanda: published masks, a run by hand, both executors, and what is not the weight of a linear layer."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import Setup, in_double, run_step
from trainc.compiler.constructs.mask.wanda import Wanda, wanda_mask
from trainc.runtime.step.optimizer import OptimizerStep

CASE = json.loads((Path(__file__).parents[2] / "reference/masks.json").read_text())["relatives"]
WEIGHTS = "ndim(2) & type(Linear) - role(head)"
CLAUSE = f"mask wanda on {WEIGHTS} {{ density = 70%, batches = 2 }}"
REST = "loss cross_entropy optimizer sgd { lr = 0.1, momentum = 0.9 } run { length = 9 steps } "


def stored(name: str) -> Tensor:
    found = CASE["wanda"][name]
    return torch.tensor(found["data"]).view(found["shape"])


def test_masks_are_those_of_the_published_code() -> None:
    weight, norm = stored("W"), stored("scaler_row").sqrt()
    half = wanda_mask(weight, norm, density=0.5)
    assert torch.equal(half, ~stored("prune_mask_50").bool())
    assert torch.equal(wanda_mask(weight, norm, structure="2:4"), ~stored("prune_mask_2_4").bool())
    of_inputs = stored("X").square().sum(0).sqrt()
    assert torch.equal(wanda_mask(weight, of_inputs, density=0.5), half)
    ties = wanda_mask(torch.ones(2, 4), torch.ones(4), density=0.5)
    assert ties.tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"density": 0.0}, "above 0, at most 1"),
        ({"density": 1.5}, "above 0, at most 1"),
        ({"structure": "n_m(2, 3)"}, "8 is no multiple of 3"),
        ({"structure": "n_m(5, 4)"}, "at most 4 of 4"),
        ({}, "`density` is missing"),
        ({"density": 0.4, "structure": "2:4"}, "keeps 0.5 of the entries"),
        ({"density": 0.5, "structure": "row"}, "not by `row`"),
        ({"density": 0.5, "norm": 3}, "one norm for each input"),
        ({"density": 0.5, "value": math.nan}, "is NaN"),
        ({"density": 0.5, "value": -1.0}, "below 0"),
    ],
)
def test_what_makes_no_sense_is_an_error(given: dict[str, Any], said: str) -> None:
    given = dict(given)
    norm = torch.full((given.pop("norm", 8),), given.pop("value", 1.0))
    with pytest.raises(ValueError, match=said):
        wanda_mask(torch.ones(4, 8), norm, **given)


def recorded(program: trainc.Program, steps: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """Train, and return the inputs of each layer's weight, a list a step, and the gradients of each step."""
    inputs, gradients = defaultdict[str, list[Tensor]](list), list[dict[str, Tensor]]()
    for name, module in program.module.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs[f"{name}.weight"].append(
                    args[0].detach().flatten(0, -2)
                )
            )
    (optimizer,) = (a for a in program.execution.method.actions if isinstance(a, OptimizerStep))

    def record(*_: object) -> None:
        found = {slot.name: slot.tensor.grad for slot in optimizer.slots}
        gradients.append({name: g.clone() for name, g in found.items() if g is not None})

    optimizer.torch.register_step_pre_hook(record)
    for seed in range(steps):
        run_step(program, in_double(Setup().batch(seed)), (4, 2))
    return inputs, gradients


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A program's weights, in micro-batches, and those of a loop by hand that ranks entry by entry."""
    model = Setup().model().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    program = trainc.compile(REST + CLAUSE, model)
    names = list(program.execution.method.masks)
    inputs, gradients = recorded(program, 4)
    assert program.state_dict()["actions"]["wanda"] == {"steps": 2}  # the sums are freed
    first = {n: inputs[n][:4] for n in names}  # two micro-batches in each of two steps
    rule = Wanda(density=0.7, batches=2)
    want = rule.reference(
        {n: before[n] for n in names},
        first,
        [{n: g[n] for n in names} for g in gradients],
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    return {n: model.get_parameter(n).detach() for n in names}, want


@pytest.mark.parametrize("mask", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("scope", ["tensor", "alpha"])
def test_weights_and_inputs_that_are_not_finite_choose_nothing_until_they_are(
    mask: str, scope: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    program = trainc.compile(
        "run { length = 9 steps, on_nan = continue } loss mse optimizer sgd { lr = 0 }"
        f" mask {mask} on ndim(2) {{ density = 50%, batches = 2, scope = {scope} }}",
        model,
    )
    (x, y), notes = (torch.randn(5, 8), torch.zeros(5, 3)), []

    def step(inputs: Tensor) -> None:
        program.step((inputs, y))
        notes.append([one for one in program.report().notes if one.startswith(f"{mask}:")])

    first, last = model.get_parameter("0.weight"), model.get_parameter("2.weight")
    step(x)
    step(torch.full_like(x, torch.inf))
    with torch.no_grad():  # the gradient of that step broke them
        for parameter in model.parameters():
            parameter.nan_to_num_(0.1)
    step(x)
    (note,) = notes[-1]
    assert note.startswith(
        f"{mask}: `0` was given inputs that are not finite, so nothing is chosen"
    )
    assert note.endswith("inputs are summed anew over 2 steps")
    step(x)
    with torch.no_grad():
        last[0, 0] = torch.nan
    step(x)
    assert notes[-1] == [
        f"{mask}: `2.weight` has entries that are not finite, so nothing is chosen in this step"
    ]
    assert int((first == 0).sum()) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0.1)
    step(x)
    assert notes[-1] == []
    assert int((first == 0).sum()) + int((last == 0).sum()) == 33


def test_what_a_choice_by_inputs_cannot_do_names_the_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    program = trainc.compile(
        "run { length = 9 steps } loss mse optimizer sgd { lr = 0 }"
        " mask sparsegpt on ndim(2) { density = 50%, batches = 1, damping = 1e-300 }",
        model,
    )
    x = torch.ones(5, 8)  # all inputs alike: their products are of rank one
    program.step((x, torch.zeros(5, 6)))
    with pytest.raises(ValueError, match=r"`0\.weight`: .*not positive definite"):
        program.step((x, torch.zeros(5, 6)))


@pytest.mark.parametrize(
    ("on", "more", "said"),
    [
        ("embed.token", "", "`embed.token.weight` is not the weight of a linear layer"),
        ("**.qkv.bias", "", "`blocks.0.attn.qkv.bias` is not the weight of a linear layer"),
        ("**.qkv.weight", ", structure = n_m(2, 3)", "remove `density`"),
        ("**.qkv.weight", ", batches = 9", "chosen after 9 steps, and 9 steps are left"),
    ],
)
def test_what_cannot_be_chosen_by_inputs_is_said_at_the_clause(
    on: str, more: str, said: str
) -> None:
    with pytest.raises(trainc.SpecError) as found:
        trainc.plan(REST + f'mask wanda on "{on}" {{ density = 50%{more} }}', Setup().model())
    assert said in str(found.value)


class Uncalled(nn.Module):
    """A model with a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.other.weight.sum()  # type: ignore[no-any-return]


def test_a_layer_that_is_not_called_is_said_by_name() -> None:
    program = trainc.compile(
        "loss cross_entropy optimizer sgd { lr = 0.1 } mask wanda on ndim(2) { density = 50%, batches = 1 }",
        Uncalled(),
        executor="module",
    )
    with pytest.raises(Exception, match="`other` did not run in the forward pass"):
        program.step((torch.randn(2, 4), torch.tensor([0, 1])))
