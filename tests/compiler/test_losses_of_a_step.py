"""What a loop of the user's own does with the losses of one step: the step is of these losses, or it is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainc
from trainc.compiler.program.program import Program

SPEC = "loss cross_entropy run { length = 40 steps } optimizer adamw { lr = 1e-2 } "


class Experts(nn.Module):
    """Two networks of which a pass uses one; the first parameter is used by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(3, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)
        )
        self.chosen = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.experts[self.chosen](x)
        return found


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (6,), generator=g)


def made(clauses: str = "") -> Program:
    return trainc.compile(SPEC + clauses, Experts())


def test_a_pass_may_leave_out_any_parameter() -> None:
    """Which parameters a pass uses may change with every micro-batch, the first one included."""
    program, plain = made(), Experts()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    model: Any = program.module
    for step in range(3):
        optimizer.zero_grad()
        for chosen in (1, 0) if step else (1, 1):
            x, y = batch(2 * step + chosen)
            model.chosen = plain.chosen = chosen
            program.loss((x, y), 0.5).backward()
            (0.5 * F.cross_entropy(plain(x), y)).backward()
        program.update()
        optimizer.step()
    for found, wanted in zip(program.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def divided(program: Program) -> None:
    (program.loss(batch(7)) / 2).backward()


def divided_twice(program: Program) -> None:
    for seed in (7, 8):
        (program.loss(batch(seed), 0.5) / 2).backward()


def scaled(program: Program) -> None:
    torch.amp.GradScaler("cpu").scale(program.loss(batch(7))).backward()


def zeroed(program: Program) -> None:
    program.loss(batch(7)).backward()
    program.module.zero_grad(set_to_none=False)


def frozen(program: Program) -> None:
    program.module.requires_grad_(False)
    program.loss(batch(7))


def negative(program: Program) -> None:
    program.loss(batch(7), 2.0).backward()
    program.loss(batch(8), -1.0).backward()


def text(program: Program) -> None:
    program.loss(batch(7), "0.5")  # type: ignore[arg-type]


def loss_in_a_block(program: Program) -> None:
    with program.micro_batch(6):
        program.loss(batch(7)).backward()


def step_before_backward(program: Program) -> None:
    with program.micro_batch(6):
        program.module(batch(7)[0])
    program.step(batch(7))


def evaluation_in_a_block(program: Program) -> None:
    with program.micro_batch(6):
        program.evaluate(*batch(7))


def tokens(program: Program) -> None:
    with program.micro_batch(6, tokens=-3):
        pass


def examples(program: Program) -> None:
    with program.micro_batch(True):
        pass


WRONG: dict[Callable[[Program], None], str] = {
    divided: r"multiplied by 0\.5, .*`program\.micro_batch`",
    divided_twice: r"multiplied by 0\.5, .*divide nothing",
    scaled: r"multiplied by 65536, .*`program\.update\(scaler\)`",
    zeroed: r"has a gradient of zeros .*`zero_grad\(\)`",
    frozen: r"no gradient, because every parameter .* frozen",
    negative: r"`loss_weight` is -1\.0: expected .* a number from 0 to 1",
    text: r"`loss_weight` is '0\.5'",
    loss_in_a_block: r"`program\.loss` was called inside of `program\.micro_batch`",
    step_before_backward: r"`program\.step` was called .* before its `program\.backward",
    evaluation_in_a_block: r"`program\.evaluate` was called inside .* before or after",
    tokens: "`tokens` is -3: expected a number of tokens, 0 or more",
    examples: "`examples` is True: expected a number of examples, 1 or more",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_would_be_another_step_is_an_error_and_can_be_run_again(
    wrong: Callable[[Program], None],
) -> None:
    program, straight = made(), made()

    def run() -> None:
        wrong(program)
        program.update()

    with pytest.raises((RuntimeError, ValueError), match=WRONG[wrong]):
        run()
    program.discard_step()
    program.module.requires_grad_(True)
    for one in (program, straight):
        one.loss(batch(7)).backward()
        one.update()
    for found, wanted in zip(
        program.module.parameters(), straight.module.parameters(), strict=True
    ):
        assert torch.equal(found, wanted)


def test_a_scaler_that_scaled_nothing_is_named() -> None:
    program = made()
    program.loss(batch(7)).backward()
    with pytest.raises(ValueError, match=r"scaled no loss yet: write `scaler\.scale\(loss\)"):
        program.update(torch.amp.GradScaler("cpu"))


def test_a_block_whose_loss_has_no_weight_counts_no_loss() -> None:
    """A mean over no targets is NaN, and has no part in the step."""
    program, straight = made(), made()
    x, y = batch(7)
    for weight, targets in ((0.0, torch.full_like(y, -100)), (1.0, y)):
        with program.micro_batch(6, loss_weight=weight):
            loss = F.cross_entropy(program.module(x), targets)
        program.backward(loss)
    straight.loss((x, y)).backward()
    assert program.update()["loss"] == straight.update()["loss"]
    for found, wanted in zip(
        program.module.parameters(), straight.module.parameters(), strict=True
    ):
        assert torch.equal(found, wanted)
