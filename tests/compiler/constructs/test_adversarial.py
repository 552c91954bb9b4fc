"""Adversarial inputs: attacks by hand, the closed form of linear models, embeddings, and the claim on margins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

import trainc
from examples.models import gpt
from tests.compiler.constructs.test_sam import data, kept
from tests.conformance import Setup, divided
from trainc.compiler.constructs.perturb.adversarial import Adversarial
from trainc.compiler.errors import SiteError

BASE = "loss cross_entropy optimizer sgd { lr = 0.3, momentum = 0.9 } "
RADIUS = 0.4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).double()


def clause(fields: str) -> str:
    return f"perturb adversarial {{ {fields} }}"


def attacked(model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int, size: float) -> Tensor:
    """Return x + d, example by example."""
    found = []
    for one, target in zip(x, y, strict=True):
        d = torch.zeros_like(one)
        for _ in range(steps):
            leaf = (one + d).requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(model(leaf[None]), target[None]), leaf)
            d = d + size * (g.sign() if norm == "linf" else g / g.norm())
            length = d.abs().max() if norm == "linf" else d.norm()
            if norm == "linf":
                d = d.clamp(-RADIUS, RADIUS)
            elif length > RADIUS:
                d = d * RADIUS / length
        found.append(one + d)
    return torch.stack(found)


@pytest.mark.parametrize(("executor", "scale"), [("module", True), ("graph", False)])
@pytest.mark.parametrize(
    ("norm", "steps", "mix"), [("l2", 1, 1.0), ("linf", 1, 0.3), ("l2", 3, 0.3), ("linf", 3, 1.0)]
)
def test_it_is_the_attack_written_by_hand(
    norm: str, steps: int, mix: float, executor: Any, scale: bool
) -> None:
    theirs, ours = net(), net()
    fields = f"norm = {norm}, radius = {RADIUS}, steps = {steps}, mix = {mix}"
    program = trainc.compile(BASE + clause(fields), ours, executor=executor)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scale else None
    for i in range(2):
        x, y = data(i)
        before = x.clone()
        size = RADIUS if steps == 1 else 2.5 * RADIUS / steps
        moved = cross_entropy(theirs(attacked(theirs, x, y, norm, steps, size)), y)
        ((1 - mix) * cross_entropy(theirs(x), y) + mix * moved).backward()
        optimizer.step()
        optimizer.zero_grad()
        got = program.step(divided((x, y), (3, 4)), scaler)
        assert got["loss"] == pytest.approx(moved.item(), rel=1e-12)
        assert torch.equal(x, before)
        if scaler is not None:
            scaler.update()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-11, atol=1e-12)


class Linear(nn.Module):
    """The logits 0 and w.x of two classes."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(len(w), 2, bias=False, dtype=torch.float64)
        self.fc.weight.data.copy_(torch.stack([torch.zeros_like(w), w]))

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_one_step_finds_the_maximum_of_a_linear_model(norm: str, dual: int) -> None:
    x, y = data(0)
    y = y % 2
    w = torch.sin(1.7 * torch.arange(6, dtype=torch.float64) + 0.3)
    model = Linear(w)
    program = trainc.compile(BASE + clause(f"norm = {norm}, radius = 0.3"), model)
    signs = 2.0 * y - 1
    wanted = softplus(-(signs * (x @ w) - 0.3 * torch.linalg.vector_norm(w, dual))).mean()
    assert program.step((x, y))["loss"] == pytest.approx(wanted.item(), rel=1e-12)


def test_adversarial_steps_reach_the_largest_margin_sooner_than_plain_ones() -> None:
    """The largest margin of these examples is sqrt(5) / 2, along (2, 1)."""
    x = torch.tensor([[1, 0.5], [0.2, 4], [3, -0.5]], dtype=torch.float64)
    x, y = torch.cat([x, -x]), torch.tensor([1, 1, 1, 0, 0, 0])
    margins = {}
    for name, text in {"plain": "", "adversarial": clause("norm = l2, radius = 0.8")}.items():
        spec = "loss cross_entropy optimizer sgd { lr = 1 } observe margin { of = training, layer = fc } "
        spec = spec.replace("= fc", '= "fc"')
        model = Linear(torch.zeros(2, dtype=torch.float64))
        program = trainc.compile(spec + text, model, executor="module")
        for _ in range(300):
            program.step((x, y))
        w = (model.fc.weight[1] - model.fc.weight[0]).detach()
        margins[name] = float((x @ w * (2 * y - 1)).min() / w.norm())
    gaps = {name: 5**0.5 / 2 - margin for name, margin in margins.items()}
    assert 0 <= gaps["adversarial"] + 1e-9 < 1e-3
    assert gaps["plain"] > 4e-3


def test_of_embeddings_it_is_that_of_inputs_on_the_rest_of_the_model() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    words = nn.Embedding(9, 4).double()
    whole = nn.Sequential(words, copy.deepcopy(head))
    fields = "norm = l2, radius = 0.4, steps = 2"
    ours = trainc.compile(BASE + clause(f'{fields}, at = "0"'), whole)
    theirs = trainc.compile(BASE + clause(fields), head)
    ids, y = torch.arange(15).view(5, 3) % 9, torch.arange(5) % 4
    embedded = words(ids).detach()
    one = ours.step(divided((ids, y), (2, 3)))
    two = theirs.step(divided((embedded, y), (2, 3)))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(whole[1].state_dict()[name], value, rtol=1e-12, atol=1e-13)
    plain = cross_entropy(whole(ids), y).item()
    whole.eval()
    assert cross_entropy(whole(ids), y).item() == plain, "nothing is added outside of steps"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_random_start_is_in_the_ball_and_inputs_stay_in_their_bounds(norm: str) -> None:
    model, seen = net(), list[Tensor]()
    fields = (
        f"norm = {norm}, radius = {RADIUS}, random_start = true, step_size = 0, low = -1, high = 1"
    )
    program = trainc.compile(BASE + clause(fields), model, executor="module")
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    x, y = data(0, 100)
    x = x.clamp(-1, 1) * 0.5
    program.step((x, y))
    program.step((x, y))
    first, second = seen[1], seen[3]
    d = first - x
    lengths = d.norm(dim=1) if norm == "l2" else d.abs().amax(1)
    assert 0.9 * RADIUS < float(lengths.max()) <= RADIUS + 1e-12
    assert float(lengths.min()) < 0.95 * RADIUS
    assert not torch.equal(first, second)
    assert float(first.abs().max()) <= 1


def test_token_inputs_and_layers_that_cannot_be_moved_are_errors_that_say_what_to_write() -> None:
    ids = torch.randint(0, 7, (5, 5), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1], ids[:, 1:]
    fields = "norm = l2, radius = 0.4"
    with pytest.raises(SiteError, match=r"`at = type\(Embedding\)`"):
        trainc.compile(BASE + clause(fields), gpt(1, 8, 2, 4, 7)).step(batch)
    every = trainc.compile(BASE + clause(f"{fields}, at = type(Embedding)"), gpt(1, 8, 2, 4, 7))
    with pytest.raises(SiteError, match="leave the layer out of the selection"):
        every.step(batch)
    found = trainc.check(BASE + clause(f'{fields}, at = "0", low = 0'))
    assert "`low` and `high` are of inputs" in found.diagnostics[0].labels[0].text


def conformance() -> Setup:
    """Return a setup with inputs of floating point."""

    def model() -> nn.Module:
        return net().float()

    return Setup(model=model, batch=lambda seed: data(seed, 6, torch.float32))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the moves of a step's inputs, and those that `reference` gives of their gradients."""
    model, seen = net(), list[Tensor]()
    program = trainc.compile(BASE + clause("norm = l2, radius = 0.4"), model, executor="module")
    x, y = data(0)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    program.step((x, y))
    method = Adversarial(norm="l2", radius=0.4)  # type: ignore[arg-type]
    (wanted,) = method.reference([torch.zeros_like(x)], [g], 0.4, 0.4)
    assert kept(model)
    return {"moves": seen[1] - x}, {"moves": wanted}
