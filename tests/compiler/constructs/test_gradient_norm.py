"""The gradient-norm penalty; its loop by hand stands in test_looksam.py, with those of its family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.compiler.constructs.test_sam import data, kept
from trainc.compiler.constructs.perturb.gradient_norm import GradientNorm

LENGTH, PART = 0.5, 0.7


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def update(fields: str) -> dict[str, Tensor]:
    """Return what a step at rate 1 takes from the weights."""
    model = net()
    before = kept(model)
    clause = f"perturb gradient_norm {{ {fields} }}"
    trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 1 }} {clause}", model).step(data(0))
    return {n: before[n] - p for n, p in kept(model).items()}


def test_for_a_short_radius_it_is_the_gradient_of_the_penalized_loss() -> None:
    model, radius = net(), 1e-5
    x, y = data(0)
    loss = cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    size = torch.cat([g.flatten() for g in gradients]).norm()
    penalty = torch.autograd.grad(size, [*model.parameters()])
    found = update(f"radius = {radius}, alpha = {PART}")
    for value, g, extra in zip(found.values(), gradients, penalty, strict=True):
        added = (value - g.detach()) / (PART * radius)
        torch.testing.assert_close(added, extra, rtol=1e-3, atol=1e-4)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradient of a step, and the mixture of two that `reference` gives."""
    model = net()
    named = dict(model.named_parameters())
    found = []
    x, y = data(0)
    for _ in range(2):
        g = torch.autograd.grad(cross_entropy(model(x), y), [*named.values()])
        found.append(dict(zip(named, g, strict=True)))
        size = torch.cat([one.flatten() for one in g]).norm()
        with torch.no_grad():
            for p, one in zip(named.values(), g, strict=True):
                p.add_(LENGTH * one / size)
    method = GradientNorm(radius=LENGTH, alpha=PART)  # type: ignore[arg-type]
    wanted = {n: method.reference(found[0][n], found[1][n]) for n in named}
    return update(f"radius = {LENGTH}, alpha = {PART}"), wanted
