"""What a loop of the user's own sees of the gradients of parameters of which some entries train, and does to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, get_total_norm

import trainc
from trainc.runtime.soundness.entry_gradient import EntryGradient

MASK = "mask sift on ndim(2) { density = 20% }"
EVERY = "mask sift on all { density = 20% }"
AGAIN = "mask sift on ndim(2) every 2 steps { density = 20%, select = movement }"
TRAIN = "loss cross_entropy optimizer sgd { lr = 0.5 } run { length = 9 steps"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(7, 6, generator=made, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (7,), generator=made)


def by_program(clip: str, mask: str) -> dict[str, Tensor]:
    program = trainc.compile(f"{TRAIN}{clip} }} {mask}", net())
    for seed in range(4):
        program.step(data(seed))
    return program.module.state_dict()


def in_loop(mask: str, act: Callable[[nn.Module], object], kind: str) -> dict[str, Tensor]:
    """Train as `by_program`, with something done to gradients before each update but the first, which chooses."""
    program = trainc.compile(f"{TRAIN} }} {mask}", net())
    for seed in range(4):
        if kind == "loss":
            program.loss(data(seed)).backward()
        elif kind == "two losses":  # both passes run before the first backward pass
            x, y = data(seed)
            parts = [(x[:3], y[:3]), (x[3:], y[3:])]
            losses = [program.loss(part, loss_weight=len(part[1]) / 7) for part in parts]
            for loss in losses:
                loss.backward()
        else:
            x, y = data(seed)
            with program.micro_batch(len(x)):
                loss = cross_entropy(program.module(x), y)
            program.backward(loss)
        act(program.module)
        program.update()
    return program.module.state_dict()


@pytest.mark.parametrize("mask", [MASK, EVERY, AGAIN])
@pytest.mark.parametrize("kind", ["loss", "two losses", "micro_batch"])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_clip_of_ones_own_is_that_of_the_spec(mask: str, kind: str, foreach: bool) -> None:
    want = by_program(", clip = 0.05", mask)
    found = in_loop(mask, lambda m: clip_grad_norm_(m.parameters(), 0.05, foreach=foreach), kind)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    free = by_program("", mask)
    assert any(not torch.allclose(free[name], tensor, atol=1e-3) for name, tensor in want.items())


@pytest.mark.parametrize("mask", [MASK, AGAIN])
def test_norms_that_are_read_are_those_of_what_trains(mask: str) -> None:
    program, norms = trainc.compile(f"{TRAIN} }} {mask}", net()), list[Tensor]()

    def read() -> None:
        norms.append(
            get_total_norm([p.grad for p in program.module.parameters() if p.grad is not None])
        )

    for seed in range(3):
        program.loss(data(seed)).backward()
        read()
        metrics = program.update()
        assert float(norms[-1]) == pytest.approx(metrics["gradient_norm"], rel=1e-12)


def shown() -> tuple[trainc.Program, Any, Any]:
    """Return a program before an update, a gradient that it shows, and the same as a plain tensor."""
    program = trainc.compile(f"{TRAIN} }} {MASK}", net())
    program.step(data(0))
    program.loss(data(1)).backward()
    gradient = program.module.get_parameter("0.weight").grad
    mask = program.execution.method.masks["0.weight"]
    assert isinstance(gradient, EntryGradient)
    return program, gradient, mask.whole(gradient.entries)


def test_what_reads_a_gradient_reads_all_of_it() -> None:
    _, gradient, want = shown()
    assert repr(gradient) == "EntryGradient(10 of 48 entries of `0.weight`)"
    for read in (
        torch.clone,
        lambda g: g.data.abs().max(),
        lambda g: g.norm(dim=0),
        lambda g: torch.linalg.vector_norm(g, dim=(0, 1)),
        lambda g: g.float(),
        lambda g: torch.zeros_like(want).add_(g),
        lambda g: torch.stack([g, g]).sum(0),
        lambda g: torch.histc(g, 5),
        lambda g: g * want,
    ):
        found = read(gradient)
        assert type(found) is Tensor
        torch.testing.assert_close(found, read(want), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [lambda g: g.clamp_(-1, 1), lambda g: g.add_(1.0), lambda g: g.mul_(torch.ones(8, 6))],
)
def test_what_would_not_reach_the_entries_is_an_error(change: Callable[[Tensor], object]) -> None:
    _, gradient, _ = shown()
    with pytest.raises(
        RuntimeError, match=r"gradient of `0\.weight`, of which .* `clip = 1\.0` of"
    ):
        change(gradient)


def test_a_gradient_that_is_freed_or_zeroed_between_is_noticed() -> None:
    acts: list[Callable[[trainc.Program], None]] = [
        lambda p: p.module.zero_grad(),
        lambda p: p.module.zero_grad(set_to_none=False),
    ]
    for act in acts:
        program, _, _ = shown()
        act(program)
        with pytest.raises(RuntimeError, match=r"something freed it or set it to zero"):
            program.update()
        program.discard_step()
        program.step(data(2))
        assert program.module.get_parameter("0.weight").grad is None


def test_gradients_that_are_averaged_later_are_not_read() -> None:
    program, gradient, _ = shown()
    program.execution.method.masks["0.weight"].averages_last = True
    for read in (
        lambda: gradient.norm(),
        lambda: clip_grad_norm_(program.module.parameters(), 1.0),
    ):
        with pytest.raises(RuntimeError, match=r"after\s+replicas have averaged it"):
            read()
