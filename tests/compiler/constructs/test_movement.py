"""Movement pruning: the sums by definition, and the entries that they choose."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.compiler.constructs.test_rigl import NAMES, compiled, data
from trainc.compiler.constructs.mask.movement import Movement
from trainc.runtime.mask.entry_choice import topk_mask
from trainc.runtime.mask.regrow import SumScores

MASK = "mask movement on ndim(2) from 2 steps every 2 steps { density = 30% }"


def run(mask: str, steps: int) -> tuple[Any, dict[str, Tensor]]:
    """Return a program after some steps, and its scores before the last of them, by definition."""
    program = compiled(mask)
    weights: list[dict[str, Tensor]] = []
    gradients: list[dict[str, Tensor]] = []
    for step in range(steps):
        program.begin()
        named = {n: program.module.get_parameter(n) for n in NAMES}
        weights.append({n: p.detach().clone() for n, p in named.items()})
        loss = F.cross_entropy(program.module(data(step)[0]), data(step)[1])
        found = torch.autograd.grad(loss, [*named.values()])
        gradients.append(dict(zip(named, found, strict=True)))
        program.step(data(step))
    return program, Movement.reference(weights[:-1], gradients[:-1])


def test_the_weights_that_move_away_from_zero_are_kept() -> None:
    program, scores = run(MASK, 5)
    for name, mask in program._method.masks.items():
        assert torch.equal(mask.kept_entries(), topk_mask(scores[name], density=0.3))
        assert bool((program.module.get_parameter(name)[~mask.kept_entries()] == 0).all())


def test_without_a_sum_the_choice_waits_for_the_first_step() -> None:
    program, scores = run("mask movement on ndim(2) { density = 30% }", 2)
    for name, mask in program._method.masks.items():
        assert torch.equal(mask.kept_entries(), topk_mask(scores[name], density=0.3))


class Complex(nn.Module):
    """A linear map by a complex weight, whose outputs are real and imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=made, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(self.weight.dtype) @ self.weight).flatten(1)


def test_complex_weights_move_by_their_parts() -> None:
    spec = (
        "loss mse optimizer sgd { lr = 0.1 } run { length = 90 steps, seed = 1 }"
        " mask movement on all from 3 steps every 9 steps { density = 30% }"
    )
    program: Any = trainc.compile(spec, Complex())
    made, state = torch.Generator().manual_seed(1), dict[str, Any]()
    parts = torch.zeros(4, 3, 2, dtype=torch.float64)
    for step in range(4):
        x, y = (torch.randn(5, n, generator=made, dtype=torch.float64) for n in (4, 6))
        weight = program.module.get_parameter("weight")
        if step < 3:
            own = torch.view_as_real(weight.detach()).clone().requires_grad_()
            out = torch.view_as_real(x.to(weight.dtype) @ torch.view_as_complex(own)).flatten(1)
            parts -= own.detach() * torch.autograd.grad(F.mse_loss(out, y), own)[0]
        if step == 2:
            state = program.state_dict()
        program.step((x, y))
    kept = program._method.masks["weight"].kept_entries()
    assert torch.equal(kept, topk_mask(parts.sum(-1), density=0.3))
    again = trainc.compile(spec, Complex())
    again.load_state_dict(state)  # the sums, which are real
    assert again.clock.steps == 2


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scores after six steps, by the program and by definition."""
    _, scores = run(MASK, 7)
    fewer, _ = run(MASK, 6)
    action = next(a for a in fewer._machine.actions if isinstance(a, SumScores))
    return dict(action.score.sums), scores
