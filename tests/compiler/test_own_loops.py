"""In a loop of the user's own each loss counts once: what would count twice, in part or not at all is an error."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainc
from trainc.compiler.errors import SiteError
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy run { length = 40 steps } optimizer adamw { lr = 1e-2 } "
SPECS = {
    "empty": BASE,
    "noise": BASE + "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5, mode = pair }",
    "measured": BASE + "noise_scale gns on type(LayerNorm)",
    "entries": BASE + "mask sift on ndim(2) { density = 20% }",
    "zeros": BASE + "mask magnitude on ndim(2) { density = 50% }",
    "averaged": BASE + "regularize ema { decay = 0.9 }",
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)
    return nn.Sequential(*parts).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (6,), generator=g)


def made(spec: str, steps: int = 2) -> Program:
    program = trainc.compile(SPECS[spec], model())
    for seed in range(steps):
        program.step(batch(seed))
    return program


def accumulate(program: Program) -> None:
    for seed in (7, 8):
        program.loss(batch(seed), 0.5).backward()


def same(one: Program, two: Program) -> bool:
    pairs = zip(one.module.parameters(), two.module.parameters(), strict=True)
    close = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)
    return close and one.clock.steps == two.clock.steps


def other_step(program: Program) -> None:
    program.loss(batch(7)).backward()
    torch.optim.SGD(program.module.parameters(), lr=0.1).step()
    program.update()


def load_weights(program: Program) -> None:
    weights = copy.deepcopy(program.module.state_dict())
    program.loss(batch(7)).backward()
    program.module.load_state_dict(weights)
    program.update()


def other_zero_grad(program: Program) -> None:
    program.loss(batch(7)).backward()
    program.module.zero_grad()
    program.update()


def zeros_instead(program: Program) -> None:
    program.loss(batch(7)).backward()
    program.module.zero_grad(set_to_none=False)
    program.update()


def zeros_in_a_part(program: Program) -> None:
    program.loss(batch(7), 0.5).backward()
    other = torch.optim.SGD(cast(Any, program.module)[1].parameters(), lr=0.1)
    other.zero_grad(set_to_none=False)
    program.loss(batch(8), 0.5).backward()
    program.update()


def zeros_between_backward_passes(program: Program) -> None:
    first, second = (program.loss(batch(seed), 0.5) for seed in (7, 8))
    first.backward()
    program.module.zero_grad(set_to_none=False)
    second.backward()
    program.update()


def free_one(program: Program) -> None:
    program.loss(batch(7), 0.5).backward()
    cast(Any, program.module)[0].bias.grad = None
    program.loss(batch(8), 0.5).backward()
    program.update()


def no_backward(program: Program) -> None:
    program.loss(batch(7)).detach()
    program.update()


def one_backward_of_two(program: Program) -> None:
    program.loss(batch(7), 0.5)
    program.loss(batch(8), 0.5).backward()
    program.update()


def two_backwards(program: Program) -> None:
    loss = program.loss(batch(7))
    loss.backward(retain_graph=True)
    loss.backward()
    program.update()


def interrupted(program: Program) -> None:
    """The first linear layer has no gradient yet, the last one has: a retry would add to it twice."""
    program.loss(batch(7), 0.5).backward()
    loss, layers = program.loss(batch(8), 0.5), cast(Any, program.module)

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    handle = layers[0].weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    handle.remove()
    program.loss(batch(8), 0.5).backward()


def two_losses(program: Program) -> None:
    program.loss(batch(7)).backward()
    program.loss(batch(8)).backward()
    program.update()


def loss_then_step(program: Program) -> None:
    program.loss(batch(7)).backward()
    program.step(batch(8))


def validation(program: Program) -> None:
    program.loss(batch(7)).backward()
    with torch.no_grad():
        program.loss(batch(9))


def own_gradient_before(program: Program) -> None:
    x, y = batch(9)
    F.cross_entropy(program.module(x), y).backward()
    program.loss(batch(7))


WRONG: dict[Callable[[Program], None], str] = {
    other_step: r"`0\.\w+` was changed between `program\.loss` and `program\.update\(\)`",
    load_weights: r"`0\.\w+` was changed between .* loading weights",
    other_zero_grad: r"has no longer a gradient before .* `zero_grad\(\)`",
    zeros_instead: r"`[01]\.\w+` has a gradient of zeros before .*`zero_grad\(\)`",
    zeros_in_a_part: r"`1\.weight` has a gradient of zeros before",
    zeros_between_backward_passes: r"`[01]\.\w+` has a gradient of zeros before",
    free_one: r"`0\.bias` has no longer a gradient",
    no_backward: r"the loss that `program\.loss` returned .* was not differentiated",
    one_backward_of_two: r"loss 1 of 2 that `program\.loss` returned",
    two_backwards: r"`backward\(\)` ran 2 times on the loss of this step",
    interrupted: r"backward pass of a micro-batch ended with an error.*discard_step",
    two_losses: r"loss weights of the step's micro-batches sum to 2, not 1",
    loss_then_step: r"`program\.step` runs a whole step, but 1 micro-batches",
    validation: r"`program\.loss` was called without gradients.*`program\.evaluate",
    own_gradient_before: r"`0\.\w+` has a gradient before the step begins.*`program\.discard_step\(\)`",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("spec", ["empty", "measured", "entries"])
def test_what_would_not_count_once_is_an_error_and_the_step_can_be_run_again(
    spec: str, wrong: Callable[[Program], None]
) -> None:
    program, straight = made(spec), made(spec)
    with pytest.raises((RuntimeError, ValueError), match=WRONG[wrong]):
        wrong(program)
    assert program.clock.steps == 2
    if wrong is other_step:  # it has moved the weights
        return
    program.discard_step()
    for one in (program, straight):
        accumulate(one)
        one.update()
    assert same(program, straight)


def failed_forward(program: Program) -> None:
    x, y = batch(8)
    program.loss(batch(7), 0.5).backward()
    with pytest.raises(RuntimeError, match="shapes"):
        program.loss((x[:, :3], y), 0.5)
    program.loss((x, y), 0.5).backward()


def first_forward_fails(program: Program) -> None:
    x, y = batch(7)
    with pytest.raises(RuntimeError, match="shapes"):
        program.loss((x[:, :3], y), 0.5)
    accumulate(program)


def evaluated(program: Program) -> None:
    program.loss(batch(7), 0.5).backward()
    program.evaluate(*batch(9))
    program.loss(batch(8), 0.5).backward()


def refused_validation(program: Program) -> None:
    program.loss(batch(7), 0.5).backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="without gradients"):
        program.loss(batch(9))
    program.loss(batch(8), 0.5).backward()


def looked_at(program: Program) -> None:
    """`torch.autograd.grad` accumulates nothing, so it is not a backward pass of the step."""
    weight = cast(Any, program.module)[3].weight
    for seed in (7, 8):
        loss = program.loss(batch(seed), 0.5)
        torch.autograd.grad(loss, weight, retain_graph=True)
        loss.backward()


def summed(program: Program) -> None:
    (program.loss(batch(7), 0.5) + program.loss(batch(8), 0.5)).backward()


def clipped(program: Program) -> None:
    """Gradients may be changed: these are shorter, or zero where they were zero, and not all of them are."""
    accumulate(program)
    torch.nn.utils.clip_grad_norm_(program.module.parameters(), 1e6)
    cast(Any, program.module)[0].bias.grad.mul_(1)


def after_update_forgotten(program: Program) -> None:
    """An error at `update` leaves the step open where what is missing can still be done."""
    program.loss(batch(7), 0.5).backward()
    loss = program.loss(batch(8), 0.5)
    with pytest.raises(RuntimeError, match="was not differentiated"):
        program.update()
    loss.backward()


RIGHT = [
    clipped,
    failed_forward,
    first_forward_fails,
    evaluated,
    refused_validation,
    looked_at,
    summed,
    after_update_forgotten,
]


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.__name__)
@pytest.mark.parametrize("spec", ["empty", "noise", "zeros"])
def test_what_counts_once_is_the_step_it_would_be_alone(
    spec: str, right: Callable[[Program], None]
) -> None:
    program, straight = made(spec), made(spec)
    right(program)
    accumulate(straight)
    assert program.update() == pytest.approx(straight.update(), nan_ok=True)
    assert same(program, straight)


def test_a_loss_of_ones_own_adds_to_the_step_that_is_open() -> None:
    """After `begin`, gradients are the step's: the update is that of both losses together."""
    program, plain = trainc.compile(BASE, model()), model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    for seed in range(3):
        (x, y), (u, v) = batch(seed), batch(seed + 20)
        program.begin()
        (0.1 * F.cross_entropy(program.module(u), v)).backward()
        program.loss((x, y)).backward()
        program.update()
        optimizer.zero_grad()
        (F.cross_entropy(plain(x), y) + 0.1 * F.cross_entropy(plain(u), v)).backward()
        optimizer.step()
    for found, wanted in zip(program.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_gradients_from_before_compile_are_named_and_those_of_frozen_parameters_are_not_asked() -> (
    None
):
    own = model()
    x, y = batch(0)
    F.cross_entropy(own(x), y).backward()
    own[0].requires_grad_(False)
    program = trainc.compile(BASE, own)
    with pytest.raises(RuntimeError, match=r"`1\.weight` has a gradient before the step begins"):
        program.step((x, y))
    own[1].zero_grad()
    own[3].zero_grad()
    program.step((x, y))


def test_running_statistics_count_a_failed_micro_batch_not_at_all() -> None:
    def with_statistics() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)).double()

    own, plain = with_statistics(), with_statistics()
    program, straight = trainc.compile(BASE, own), trainc.compile(BASE, plain)
    x, y = batch(1)
    for seed in range(2):
        for one in (program, straight):
            one.loss(batch(seed), 0.5).backward()
            if one is program:
                with pytest.raises(ValueError, match="is the class 5"):
                    one.loss((x, y + 50), 0.5)
            one.loss((x, y), 0.5).backward()
            one.update()
    assert torch.equal(own[0].running_mean, plain[0].running_mean)  # type: ignore[arg-type]
    assert torch.equal(own[0].weight, plain[0].weight)  # type: ignore[arg-type]


def test_weights_that_the_forward_pass_changes_itself_are_no_fault() -> None:
    words = nn.Embedding(9, 4, max_norm=0.5)
    program = trainc.compile(BASE, nn.Sequential(words, nn.Flatten(), nn.Linear(8, 4)))
    data = torch.randint(0, 9, (6, 2)), torch.arange(6) % 4
    for _ in range(2):
        program.loss(data, 0.5).backward()
        program.loss(data, 0.5).backward()
        program.update()


@pytest.mark.parametrize("spec", ["noise", "measured"])
@pytest.mark.parametrize("road", ["step", "loop"])
def test_a_model_left_in_eval_mode_is_an_error_where_clauses_act_in_train_mode(
    spec: str, road: str
) -> None:
    program, straight = made(spec), made(spec)
    program.module.eval()
    run: Any = program.step if road == "step" else program.loss
    with pytest.raises(SiteError, match=r"the model is in eval mode.*`model\.train\(\)`"):
        run(batch(7))
    program.module.train()
    for one in (program, straight):
        accumulate(one)
        one.update()
    assert same(program, straight)


def test_a_layer_in_eval_mode_that_a_clause_changes_is_named_and_other_parts_may_be() -> None:
    program = made("noise", 0)
    layers: Any = program.module
    layers[1].eval()
    program.step(batch(0))
    layers[0].eval()
    with pytest.raises(SiteError, match=r"`0` is in eval mode.*changed by.*exclude it from `on`"):
        program.step(batch(1))


def test_a_plain_spec_trains_in_eval_mode() -> None:
    program = made("empty")
    program.module.eval()
    before = program.module.state_dict()["0.weight"].clone()
    program.step(batch(7))
    assert not torch.equal(program.module.state_dict()["0.weight"], before)


def test_saving_in_an_open_step_leaves_it_open(tmp_path: Path) -> None:
    program, straight = made("averaged"), made("averaged")
    program.loss(batch(7), 0.5).backward()
    program.save(tmp_path / "saved")
    program.state_dict()
    program.loss(batch(8), 0.5).backward()
    accumulate(straight)
    for one in (program, straight):
        one.update()
    assert same(program, straight)


def test_an_evaluation_leaves_parts_in_the_mode_that_they_have() -> None:
    program = made("empty", 0)
    layers: Any = program.module
    layers[1].eval()
    program.evaluate(*batch(1))
    assert [part.training for part in layers] == [True, False, True, True]
    assert program.module.training


class Twice(nn.Module):
    """Runs its norm once or twice, as `again` says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(self.norm(x) if self.again else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("road", ["step", "loop", "own loss"])
def test_a_measured_layer_that_runs_twice_in_a_later_step_is_an_error(road: str) -> None:
    own: Any = Twice().double()
    program = trainc.compile(SPECS["measured"], own, executor="module")
    x, y = batch(0)

    def run() -> None:
        if road == "step":
            program.step((x, y))
            return
        if road == "loop":
            program.loss((x, y)).backward()
        else:
            with program.micro_batch(len(x)):
                loss = F.cross_entropy(own(x), y)
            program.backward(loss)
        program.update()

    run()
    own.again = True
    with pytest.raises(SiteError, match=r"`norm` ran more than once in one forward pass"):
        run()
    own.again = False
    run()


@pytest.mark.parametrize("spec", ["entries", "zeros", "measured"])
def test_a_model_has_one_program_that_masks_or_measures_until_it_is_unbound(spec: str) -> None:
    own: Any = model()
    first = trainc.compile(SPECS[spec], own)
    first.step(batch(0))
    for other in (BASE, SPECS[spec]):
        if spec == "measured" and other is BASE:
            continue  # another optimizer beside it changes nothing that is measured
        with pytest.raises(SiteError, match=r"another program.*`unbind` first"):
            trainc.compile(other, own)
    first.unbind()
    with pytest.raises(RuntimeError, match="unbound from its model"):
        first.step(batch(1))
    second = trainc.compile(SPECS[spec], own)
    before = own[0].weight.detach().clone()
    second.step(batch(1))
    second.step(batch(2))
    assert not torch.equal(own[0].weight, before)
