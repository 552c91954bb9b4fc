"""Activation checkpoints run a forward pass without gradients, which is no evaluation: steps are as without them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainc

HEADER = """train 1
loss cross_entropy
run { length = 9 steps, seed = 4 }
optimizer sgd { lr = 0.1 }
"""
CLAUSES = {
    "views share dropout": 'regularize pace on "a" { sigma = 0.5, weight = 0.5 }',
    "kl": 'regularize pace on "a" { sigma = 0.5, weight = 0.5, distance = kl }',
    "r_drop": "regularize r_drop { weight = 0.5 }",
    "norms": "noise_scale gns on type(LayerNorm)",
    "all layers": "noise_scale gns on type(Linear) | type(Embedding) | type(LayerNorm)",
    "groups": "noise_scale gns on type(BatchNorm1d) { method = ghost, group = 2 }",
    "ghosts": "normalize ghost_batch on type(BatchNorm1d) { size = 2 }",
    "both": 'regularize pace on "a" { sigma = 0.5, weight = 0.5 }\nnoise_scale gns on type(LayerNorm)',
    "sam": "perturb sam { rho = 0.05 }",
    "adapters": 'adapt lora on "a" { rank = 2, alpha = 4 }',
}
Runs = Callable[..., Any]


class OnceMore(torch.autograd.Function):
    """A function's own checkpoint, as reversible layers have one: forward without gradients, then once more."""

    @staticmethod
    def forward(ctx: Any, function: Runs, x: Tensor) -> Tensor:
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(x)
        result: Tensor = function(x)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        again = x.detach().requires_grad_()
        now = torch.get_rng_state()
        with torch.enable_grad():
            torch.set_rng_state(ctx.state)
            result = ctx.function(again)
        torch.set_rng_state(now)
        torch.autograd.backward(result, grads)
        return None, again.grad


def plainly(function: Runs, x: Tensor) -> Any:
    return function(x)


def not_reentrant(function: Runs, x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=False)


def reentrant(function: Runs, x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=True)


def once_more(function: Runs, x: Tensor) -> Any:
    return OnceMore.apply(function, x)  # type: ignore[no-untyped-call]


class Block(nn.Module):
    """A model of 11 words with a block that may run in a checkpoint, and a head that may share a weight."""

    def __init__(self, run: Runs, *, batch_norm: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.run = run
        self.words, self.a = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.3)
        self.batch = nn.BatchNorm1d(8) if batch_norm else None
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.whole = False

    def block(self, z: Tensor) -> Tensor:
        y = self.drop(self.norm(self.a(z)))
        if self.batch is not None:
            y = self.batch(y.transpose(1, 2)).transpose(1, 2)
        return z + torch.tanh(y)

    def forward(self, ids: Tensor) -> Any:
        z = self.words(ids)
        if self.whole:
            return self.run(lambda z: self.head(self.block(z)), z)
        return self.head(self.run(self.block, z))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(11, (6, 5), generator=generator) for _ in range(2))
    return ids, targets


def trained(spec: str, model: nn.Module, executor: str) -> tuple[list[Any], dict[str, Tensor]]:
    """What two steps measure, and the weights after them."""
    program = trainc.compile(HEADER + spec + "\n", model, executor=executor)  # type: ignore[arg-type]
    records = []
    for seed in range(2):
        torch.manual_seed(seed)
        records.append(program.step(batch()))
    return records, {name: p.detach().clone() for name, p in model.named_parameters()}


def made(run: Runs, spec: str, **options: Any) -> Block:
    torch.manual_seed(0)
    return Block(run, batch_norm="BatchNorm" in spec, **options)


def same(found: Any, wanted: Any) -> None:
    for mine, theirs in zip(found[0], wanted[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    for name, weight in wanted[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("executor", ["module", "auto"])
@pytest.mark.parametrize("run", [not_reentrant, reentrant, once_more])
@pytest.mark.parametrize("clause", CLAUSES)
def test_steps_are_those_without_checkpoints(clause: str, run: Runs, executor: str) -> None:
    if clause == "adapters" and run is once_more:
        return  # without an input that needs a gradient, such a function gives a result without one
    spec = CLAUSES[clause]
    wanted = trained(spec, made(plainly, spec), "module")
    same(trained(spec, made(run, spec), executor), wanted)


def test_what_comes_after_frozen_layers_is_trained_in_a_checkpoint_too() -> None:
    found = []
    for run in (plainly, reentrant):
        text = HEADER.replace("lr = 0.1", 'lr = 0.1, freeze = "words.**"')
        program = trainc.compile(text, made(run, ""), executor="module")
        torch.manual_seed(0)
        record = program.step(batch())
        found.append(([record], dict(program.module.named_parameters())))
    same(found[1], found[0])


@pytest.mark.parametrize("executor", ["module", "auto"])
@pytest.mark.parametrize("whole", [False, True], ids=["embedding outside", "head inside"])
def test_a_shared_weight_is_measured_across_a_reentrant_checkpoint(
    whole: bool, executor: str
) -> None:
    spec = "noise_scale gns on type(Linear) | type(Embedding)"
    found = []
    for run in (plainly, reentrant):
        model = made(run, spec, tied=True)
        model.whole = whole
        found.append(trained(spec, model, executor))
    same(found[1], found[0])


def test_a_pass_without_gradients_in_an_open_step_is_the_users_own() -> None:
    spec = CLAUSES["all layers"]
    model = made(plainly, spec)
    model.drop.p = 0.0
    program = trainc.compile(HEADER + spec + "\n", model, executor="module")
    want = made(plainly, spec)
    want.drop.p = 0.0
    loss = program.loss(batch())
    with torch.no_grad():  # in train mode, of fewer examples than the step measures
        assert torch.equal(model(batch()[0][:3]), want(batch()[0][:3]))
    loss.backward()
    assert program.update()["gns.noise"] > 0
