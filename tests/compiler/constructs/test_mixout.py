"""Mixout: its definition, its gradient, and a start that survives a resume."""

import copy

import torch
from torch import Tensor, nn

import trainc
from tests.compiler.test_weight_hooks import key_of
from trainc.compiler.constructs.regularize.weights.mixout import Mixout
from trainc.compiler.program.program import Program
from trainc.kernels.noise.random_entries import random_entries

SPEC = "loss mse optimizer sgd { lr = 0.3 } run { length = 9 steps } "
MIXOUT = "regularize mixout on all { p = 0.6 }"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def kept(program: Program, name: str) -> Tensor:
    (site,) = [
        s.weight for s in program.execution.rewrite.hooks if s.weight and s.weight.name == name
    ]
    weight = program.module.get_parameter(name)
    return random_entries(weight, key_of(program), site.index, "uniform") >= 0.6


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    program, start = trainc.compile(SPEC + MIXOUT, model()), model()
    (x, y), own = data(), program.module
    for _ in range(2):
        program.step((x, y))
    named, masks = dict(own.named_parameters()), {n: kept(program, n) for n in ("weight", "bias")}
    changed = {
        n: Mixout.reference(named[n], start.get_parameter(n).detach(), masks[n], 0.6) for n in named
    }
    wanted = torch.nn.functional.mse_loss(x @ changed["weight"].T + changed["bias"], y)
    results = []
    for loss in (program.loss((x, y)), wanted):
        found = torch.autograd.grad(loss, list(named.values()))
        results.append({"loss": loss.detach(), **dict(zip(named, found, strict=True))})
    assert torch.equal(results[0]["weight"].eq(0), ~masks["weight"])
    return results[0], results[1]


def test_the_start_is_that_of_the_first_program() -> None:
    program = trainc.compile(SPEC + MIXOUT, model())
    program.step(data())
    later = trainc.compile(SPEC + MIXOUT, nn.Linear(4, 3).double())
    later.load_state_dict(copy.deepcopy(program.state_dict()))
    assert program.step(data()) == later.step(data())
    assert torch.equal(*(p.module.get_parameter("weight") for p in (program, later)))
