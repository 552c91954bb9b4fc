"""LISA: which blocks train is a function of seed and step, the others rest, and their optimizer state is freed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trainc
from examples.models import gpt
from tests.conformance import Setup, in_double, run_step
from trainc.compiler.constructs.mask.lisa import DrawBlocks, Lisa
from trainc.compiler.program.program import Program
from trainc.runtime.step.optimizer import OptimizerStep

BLOCKS = 4


def deep_gpt() -> torch.nn.Module:
    torch.manual_seed(0)
    return gpt(layers=BLOCKS, width=8, heads=2, context=8, vocabulary=24)


def program_of(
    clause: str, optimizer: str = "sgd { lr = 0.1 }", seed: int = 3, double: bool = True
) -> Program:
    rest = f"loss cross_entropy optimizer {optimizer} run {{ length = 40 steps, seed = {seed} }} "
    model = deep_gpt()
    return trainc.compile(rest + clause, model.double() if double else model)


def draw_of(program: Program) -> DrawBlocks:
    (found,) = (a for a in program.execution.method.actions if isinstance(a, DrawBlocks))
    return found


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A program's weights, and those of a loop by hand that moves what is not paused."""
    program = program_of("mask lisa every 2 steps { active = 1 }")
    plain: Any = copy.deepcopy(program.module)
    want = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for seed in range(6):
        x, y = batch = in_double(Setup().batch(seed))
        run_step(program, batch)
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(want[name])
        loss = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        gradient = dict(zip(want, torch.autograd.grad(loss, list(plain.parameters())), strict=True))
        trained = want.keys() - draw_of(program).paused.now
        want = Lisa.reference(want, [gradient], [trained], 0.1)
    return {n: p.detach() for n, p in program.module.named_parameters()}, want


def drawn(program: Program, steps: int) -> list[set[int]]:
    """Run steps, and return the blocks that trained in each: those whose weights moved."""
    found = []
    for seed in range(steps):
        before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
        run_step(program, Setup().batch(seed))
        moved = {n for n, p in program.module.named_parameters() if not torch.equal(p, before[n])}
        assert {"embed.token.weight", "ln_f.weight", "head.weight"} <= moved
        blocks = [{n for n in before if n.startswith(f"blocks.{i}.")} for i in range(BLOCKS)]
        assert all(block <= moved or block.isdisjoint(moved) for block in blocks)
        found.append({i for i, block in enumerate(blocks) if block <= moved})
    return found


def test_the_draw_follows_from_seed_and_step_and_all_blocks_train_outside_of_its_times() -> None:
    clause = "mask lisa from 1 steps until 7 steps every 2 steps { active = 2 }"
    decaying = "adamw { lr = 0.01, weight_decay = 0.1 }"
    one, again = (drawn(program_of(clause, decaying, double=False), 8) for _ in range(2))
    assert one == again  # a replica, or the run once more
    assert one[0] == one[7] == {0, 1, 2, 3}
    assert one[1] == one[2]
    assert one[3] == one[4]
    assert one[5] == one[6]
    assert all(len(blocks) == 2 for blocks in one[1:7])
    others = drawn(program_of(clause, decaying, seed=4, double=False), 8)
    assert others != one


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_the_optimizer_holds_the_moments_of_active_blocks_alone_unless_they_are_kept(
    state: str,
) -> None:
    clause = f"mask lisa every 1 steps {{ active = 1, state = {state} }}"
    program = program_of(clause, "adamw { lr = 0.01 }", double=False)
    seen: set[str] = set()
    for seed in range(6):
        run_step(program, Setup().batch(seed))
        paused = draw_of(program).paused.now
        trained = {n for n, _ in program.module.named_parameters()} - paused
        seen |= trained
        (optimizer,) = (a for a in program.execution.method.actions if isinstance(a, OptimizerStep))
        held = {n for n in seen if optimizer.state_of(n)}
        assert held == (trained if state == "drop" else seen)
    assert len(seen) > len(trained)


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ("mask lisa { active = 4 }", "all of the 4 selected blocks would train in every step"),
        ('mask lisa on "embed.**"', "`embed.token.weight` is in no block of the model"),
    ],
)
def test_what_cannot_be_is_said_at_the_clause(clause: str, said: str) -> None:
    with pytest.raises(trainc.SpecError) as found:
        program_of(clause)
    assert said in str(found.value)


def test_an_optimizer_that_asks_for_gradients_again_is_refused() -> None:
    with pytest.raises(trainc.SpecError, match="`lisa` freezes parameters of `torch`"):
        program_of("mask lisa { active = 1 }", 'torch("torch.optim:LBFGS") { lr = 0.1 }')
