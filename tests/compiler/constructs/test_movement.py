"""Movement pruning: the sums by definition, and the entries that they choose."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scores after six steps, by the program and by definition."""
    _, scores = run(MASK, 7)
    fewer, _ = run(MASK, 6)
    action = next(a for a in fewer._machine.actions if isinstance(a, SumScores))
    return dict(action.score.sums), scores
