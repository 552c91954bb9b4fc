"""DropConnect: its definition, the mean over many draws, and probabilities that leave nothing."""

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.test_weight_hooks import key_of
from trainc.compiler.constructs.regularize.weights.drop_connect import DropConnect
from trainc.kernels.noise.random_entries import random_entries

SPEC = "loss mse optimizer sgd { lr = 0.1 } run { length = 9 steps } "


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    program = trainc.compile(SPEC + "regularize drop_connect on all { p = 0.4 }", model)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    sites = [site.weight for site in program.execution.rewrite.hooks if site.weight]
    changed = {}
    for site in sites:
        weight = model.get_parameter(site.name)
        keep = random_entries(weight, key_of(program), site.index, "uniform") >= 0.4
        assert bool(keep.any())
        assert not bool(keep.all())
        changed[site.attribute] = DropConnect.reference(weight, keep, 0.4)
    wanted = torch.nn.functional.mse_loss(x @ changed["weight"].T + changed["bias"], y)
    results = []
    for loss in (program.loss((x, y)), wanted):
        found = torch.autograd.grad(loss, [model.weight, model.bias])
        results.append({"loss": loss.detach(), "weight": found[0], "bias": found[1]})
    return results[0], results[1]


def test_the_mean_over_steps_is_the_weight() -> None:
    key = torch.arange(1000)
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    drawn = torch.stack([random_entries(weight, k, 0, "uniform") >= 0.3 for k in key << 32])
    changed = weight * drawn / 0.7
    # Within five standard errors; the deviation of an entry is |w| sqrt(p / (1 - p)).
    apart = (changed.mean(0) - weight).abs() / weight.abs()
    assert float(apart.max()) < 5 * (0.3 / 0.7 / len(key)) ** 0.5


def test_a_probability_that_leaves_nothing_is_refused() -> None:
    for p in ("1", "linear(from = 0, to = 1, over = 1 steps)"):
        with pytest.raises(trainc.SpecError, match="expected 0 or more, below 1"):
            trainc.plan(SPEC + f"regularize drop_connect on all {{ p = {p} }}", nn.Linear(4, 3))
