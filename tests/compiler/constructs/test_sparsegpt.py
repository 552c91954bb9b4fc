"""SparseGPT: the solver against explicit inverses, and a run that prunes once."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.mask.sparsegpt import Sparsegpt, sparsegpt


def numbers(*shape: int, phase: float = 0.0) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1.7 * i + 0.3 + phase).mul(1 + 0.1 * torch.cos(0.9 * i)).view(*shape)


@pytest.mark.parametrize(
    ("block", "density"), [(128, 0.5), (4, 0.5), (3, 0.7), (1, 0.5), (7, 0.25)]
)
def test_it_is_the_step_by_step_elimination_with_explicit_inverses(
    block: int, density: float
) -> None:
    weight, inputs = numbers(5, 7), numbers(9, 7, phase=1.0)
    inputs[:, 4] = 0
    rule = Sparsegpt(density=density, block=block)
    found, kept = sparsegpt(weight, inputs.T @ inputs, density, block=block)
    torch.testing.assert_close(found, rule.reference(weight, inputs), rtol=1e-10, atol=1e-10)
    assert torch.equal(found == 0, ~kept)
    assert not kept[:, 4].any()


def test_two_of_four_are_kept_and_the_output_is_nearer_than_without_the_moves() -> None:
    weight, inputs = numbers(6, 8), numbers(30, 8, phase=2.0)
    found, kept = sparsegpt(weight, inputs.T @ inputs, structure="2:4", block=4)
    assert (kept.view(6, 2, 4).sum(-1) == 2).all()
    error = ((weight - found) @ inputs.T).norm()
    assert error < ((weight - weight * kept) @ inputs.T).norm()
    # The least error of all weights with the mask of a row, is not above that of the blocked pass.
    best = 0.0
    for row, mask in zip(weight, kept, strict=True):
        target = inputs @ row
        solved = torch.linalg.lstsq(inputs[:, mask], target[:, None]).solution[:, 0]
        best += float((inputs[:, mask] @ solved - target).square().sum())
    assert best**0.5 <= float(error)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"density": 0.0}, "above 0, at most 1"),
        ({"structure": "2:3"}, "8 is no multiple of 3"),
        ({"structure": "2:4", "block": 6}, "a block of 6 inputs is no multiple of 4"),
        ({"density": 0.5, "hessian": torch.eye(3)}, "expected a finite Hessian"),
        ({"density": 0.5, "hessian": torch.full((8, 8), torch.nan)}, "expected a finite Hessian"),
        ({"density": 0.5, "hessian": -torch.eye(8)}, "not positive definite"),
        ({"density": 0.5, "weight": torch.ones(8)}, "expected a finite weight"),
        ({"density": 0.5, "weight": torch.full((4, 8), torch.nan)}, "expected a finite weight"),
        ({"density": 0.5, "block": 0}, "`block` is 0"),
        ({"density": 0.5, "damping": -1.0}, "`damping` -1"),
    ],
)
def test_what_makes_no_sense_is_an_error(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sparsegpt(**{"weight": torch.ones(4, 8), "hessian": torch.eye(8), **given})


class Linear(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5, bias=False)
        self.fc.weight.data = numbers(5, 7).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's weight when a program with a rate of 0 has pruned it, over two steps of two micro-batches."""
    model = Linear().double()
    program = trainc.compile(
        "loss mse optimizer sgd { lr = 0 } mask sparsegpt on all { density = 60%, batches = 2, block = 4 }",
        model,
    )
    start, inputs = model.fc.weight.detach().clone(), numbers(12, 7, phase=1.0)
    target = torch.zeros(3, 5, dtype=torch.float64)
    for step in range(3):
        part = inputs[6 * (step % 2) :][:6]
        program.step([(part[:3], target), (part[3:], target)])
    rule = Sparsegpt(density=0.6, block=4)
    return {"fc": model.fc.weight.detach()}, {"fc": rule.reference(start, inputs)}
