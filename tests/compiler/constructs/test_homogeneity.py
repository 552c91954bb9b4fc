"""Homogeneity: the degrees of layers as they are published, and the definition for what has none."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.observe.weights.homogeneity import Homogeneity

REST = "loss cross_entropy optimizer sgd on trainable { lr = 0.1 } run { length = 4000 steps }"


def mlp(layers: int = 3, *, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(4, 4, bias=bias)] + [nn.ReLU()] * (i < layers - 1)
    return nn.Sequential(*parts).double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, generator=made, dtype=torch.float64), torch.arange(size) % 4


def encoder() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.LayerNorm(4, eps=0.0, elementwise_affine=False)
    return nn.Sequential(nn.Linear(4, 4, bias=False), norm, nn.Linear(4, 4, bias=False)).double()


def product() -> nn.Module:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4, bias=False), mlp(2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.a(x) * self.b(x)
            return found

    return Product().double()


def normed(*, affine: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.LayerNorm(4, eps=0.0, elementwise_affine=affine)
    return nn.Sequential(nn.Linear(4, 4), norm).double()


DEGREES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "one linear layer": (lambda: mlp(1), 1),
    "a linear layer adds 1, a ReLU keeps it": (lambda: mlp(3), 3),
    "an affine layer of the input": (lambda: mlp(1, bias=True), 1),
    "a norm gives 0": (lambda: normed(affine=False), 0),
    "a norm with weights gives 1": (lambda: normed(affine=True), 1),
    "a product adds degrees": (product, 3),
    "norm, then a layer": (encoder, 1),
}


@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("c", [1.5, 10.0])
def test_degrees_are_those_of_the_published_table(name: str, c: float) -> None:
    make, degree = DEGREES[name]
    found = trainc.compile(f"{REST} observe homogeneity every 1 steps {{ c = {c} }}", make()).step(
        batch()
    )
    assert found["homogeneity.degree"] == pytest.approx(degree, abs=1e-9)
    assert found["homogeneity"] < 1e-12


def outputs(model: nn.Module, c: float) -> tuple[Tensor, Tensor]:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(c)
    x, _ = batch()
    return model(x).detach(), other(x).detach()


def test_biases_spoil_it_and_layers_have_degrees_of_their_own() -> None:
    model = mlp(bias=True)
    wanted = Homogeneity().reference(*outputs(model, 2))
    program = trainc.compile(
        f'{REST} observe homogeneity every 1 steps {{ layers = "0" | "2" }}', model
    )
    found = program.step(batch())
    assert (found["homogeneity.degree"], found["homogeneity"]) == pytest.approx(wanted, rel=1e-9)
    assert found["homogeneity"] > 0.01
    degrees = program.report().series["homogeneity.degree"]
    assert degrees["0"] == pytest.approx(1)
    assert 1 < degrees["2"] < 2
    assert program.report().series["homogeneity"]["0"] < 1e-12


@pytest.mark.parametrize("degree", [None, 2.0, 3.0])
def test_any_division_has_the_error_of_the_whole(degree: float | None) -> None:
    """Also where the powers of the micro-batches differ: of a network that is none."""
    given = "" if degree is None else f", degree = {degree}"
    model, (x, y) = mlp(bias=True), batch()
    wanted = Homogeneity(c=3.0, degree=degree).reference(*outputs(model, 3))
    clause = f"{REST} observe homogeneity every 1 steps {{ c = 3{given} }}"
    for sizes in ((6,), (1, 5), (2, 3, 1)):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        found = trainc.compile(clause, copy.deepcopy(model)).step(parts)
        assert found["homogeneity"] == pytest.approx(wanted[1], rel=1e-9)
        assert found["homogeneity.degree"] == pytest.approx(wanted[0], rel=1e-9)


def test_an_output_that_turns_round_has_no_degree() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.cos(math.pi * (self.w - 1))

    found = trainc.compile(f"{REST} observe homogeneity every 1 steps", Turns()).step(batch())
    assert "homogeneity.degree" not in found
    assert found["homogeneity"] == pytest.approx(0, abs=1e-12)  # f(x; 2) = -f(x; 1)
    assert Homogeneity().reference(*outputs(Turns(), 2))[0] is None


def test_outputs_of_zero_are_nothing_to_compare_and_that_is_said() -> None:
    model = mlp(2)
    with torch.no_grad():
        [*model.parameters()][-1].zero_()
    program = trainc.compile(f"{REST} observe homogeneity every 1 steps", model)
    assert "homogeneity" not in program.step(batch())
    assert any(
        "homogeneity: nothing to compare, because" in note for note in program.report().notes
    )
    assert "homogeneity" in program.step(batch())
    assert not program.report().notes


def test_training_is_bit_equal_with_and_without() -> None:
    states = []
    for clause in ("", 'observe homogeneity every 1 steps { layers = "0" }'):
        model = mlp(bias=True)
        program = trainc.compile(f"{REST} {clause}", model)
        for _ in range(3):
            program.step(batch())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return degree and error by the program, in two micro-batches, and by definition."""
    model, (x, y) = mlp(bias=True), batch()
    degree, error = Homogeneity().reference(*outputs(model, 2))
    program = trainc.compile(f"{REST} observe homogeneity every 1 steps", model)
    found: dict[str, Any] = program.step([(x[:2], y[:2]), (x[2:], y[2:])])
    names = ("homogeneity", "homogeneity.degree")
    assert degree is not None
    want = dict(zip(names, (error, degree), strict=True))
    return (
        {name: torch.tensor(found[name], dtype=torch.float64) for name in names},
        {name: torch.tensor(want[name], dtype=torch.float64) for name in names},
    )
