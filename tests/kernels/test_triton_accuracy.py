"""The Triton sources, by the interpreter, against float64 on inputs that make arithmetic fail."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy_problems import divergence
from benchmarks.adversarial import LOGITS
from trainc.kernels.loss import cross_entropy_consistency as consistency
from trainc.kernels.norm import layer_norm, rms_norm

pytestmark = pytest.mark.interpreter

EPS = 1e-5
UNIT = torch.finfo(torch.float32).eps
NORM_FAMILIES = ("normal", "large mean", "tiny variance", "denormal", "huge entry", "wide range")
# Units by which the loss's results may be off, and the multiple of the composition's error: views
# that are equal but for rounding differ by their last bits alone.
KNOWN = {"tiny variance": (4.0, 16.0)}
# Of one sum, a processor's rounding may hit it by luck: as many draws as make the error a matter of the arithmetic.
DRAWS = {"tiny variance": 8}
LABELS = torch.tensor([1, 4, 20])
LOSS_FAMILIES = ("normal", "large mean", "tiny variance", "confident")


def made(family: str, *shape: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return LOGITS[family](torch.randn(shape, dtype=torch.float64), torch.float32).float()


def errors(got: Tensor, exact: Tensor) -> Tensor:
    """Each example's largest error in units in the last place of its largest entry."""
    apart, size = ((one.double().flatten(1).abs().amax(1)) for one in (got - exact, exact))
    return apart / (size * UNIT).clamp(min=torch.finfo(torch.float32).tiny * UNIT)


def no_worse(got: Any, theirs: Any, exact: Any, units: float = 4.0, factor: float = 2.0) -> None:
    """Off by so many units at most, or by a multiple of what the other results are off."""
    for place, three in enumerate(zip(got, theirs, exact, strict=True)):
        mine, other = largest_errors(*three)
        assert mine <= max(units, factor * other), (place, mine, other)


def largest_errors(got: Tensor, theirs: Tensor, exact: Tensor) -> tuple[float, float]:
    rows = [one.reshape(one.shape[0] if one.dim() > 1 else 1, -1) for one in (got, theirs, exact)]
    assert rows[0].isfinite().all()
    return float(errors(rows[0], rows[2]).max()), float(errors(rows[1], rows[2]).max())


@pytest.mark.parametrize("family", NORM_FAMILIES)
def test_layer_norm(family: str) -> None:

    x, dy = made(family, 3, 2, 40), torch.randn(3, 2, 40)
    weight, bias = torch.randn(40), torch.randn(40)
    y, mean, rstd = layer_norm.OPERATOR.cuda_forward(x, [40], weight, bias, torch.zeros(3, 2), EPS)
    mask = [True, True, True]
    got = layer_norm.OPERATOR.cuda_backward(dy, x, [40], mean, rstd, weight, bias, mask)
    plain = layer_norm.eager_forward(x, [40], weight, bias, torch.zeros(3, 2), EPS)
    theirs = layer_norm.eager_backward(dy, x, [40], *plain[1:], weight, bias, mask)
    wide, gain, shift, grad = (one.double() for one in (x, weight, bias, dy))
    exact = layer_norm.reference(wide, [40], gain, shift, grad, EPS)
    order = ("y", "dx", "dweight", "dbias", "norms")
    no_worse((y, *got), (plain[0], *theirs), [exact[name] for name in order])


@pytest.mark.parametrize("family", [*NORM_FAMILIES, "large"])
def test_rms_norm(family: str) -> None:

    x, dy, weight = made(family, 3, 2, 40), torch.randn(3, 2, 40), torch.randn(40)
    y, rstd = rms_norm.OPERATOR.cuda_forward(x, [40], weight, torch.zeros(3, 1), EPS, "none")
    got = rms_norm.OPERATOR.cuda_backward(dy, x, [40], rstd, weight, "none", [True, True], True)
    plain = rms_norm.eager_forward(x, [40], weight, torch.zeros(3, 1), EPS, "none")
    theirs = rms_norm.eager_backward(dy, x, [40], plain[1], weight, "none", [True, True], True)
    wide, gain, grad = (one.double() for one in (x, weight, dy))
    exact = rms_norm.reference(wide, [40], gain, grad, EPS)
    no_worse((y, *got), (plain[0], *theirs), [exact[n] for n in ("y", "dx", "dweight", "norms")])


def composed(logits: Tensor, distance: str, smoothing: float) -> tuple[Tensor, ...]:
    """Loss, cross-entropy, consistency and the gradient of the logits by the definition."""
    leaf = logits.detach().clone().requires_grad_()
    weight = torch.tensor(0.5, dtype=logits.dtype)
    found = consistency.reference(leaf, LABELS, weight, distance, -100, smoothing)
    return *(one.detach() for one in found), *torch.autograd.grad(found[0], leaf)


@pytest.mark.parametrize("distance", consistency.DISTANCES)
@pytest.mark.parametrize("family", LOSS_FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss(family: str, distance: str, smoothing: float) -> None:
    units, factor = KNOWN.get(family, (4.0, 2.0))
    draws = range(DRAWS.get(family, 2))
    found = torch.tensor([loss_errors(family, distance, smoothing, seed) for seed in draws])
    for place, (mine, other) in enumerate(found.square().mean(0).sqrt().tolist()):
        assert mine <= max(units, factor * other), (place, mine, other)


def loss_errors(
    family: str, distance: str, smoothing: float, seed: int
) -> list[tuple[float, float]]:
    """Errors of the kernels and of the composition, in units, for each result of one draw."""
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    logits, options = made(family, 2 * len(LABELS), 33, seed=seed), (distance, -100, smoothing)
    *results, kept = triton_loss.forward(logits, LABELS, torch.tensor(0.5), *options)
    scales = (torch.tensor(1.0), torch.tensor(0.5))
    gradient = triton_loss.backward(logits, LABELS, kept, *scales, *options)
    theirs = composed(logits, distance, smoothing)
    exact = composed(logits.double(), distance, smoothing)
    return [
        largest_errors(*three) for three in zip((*results, gradient), theirs, exact, strict=True)
    ]


@pytest.mark.parametrize("ahead", [5.0, 15.0, 30.0])
def test_the_divergence_of_two_sure_views_keeps_its_gradient(
    ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    monkeypatch.setattr(
        triton_loss, "BLOCKS", {1: 16, 4: 16}
    )  # the largest logit is in the second block
    torch.manual_seed(0)
    first = torch.randn(3, 37)
    first[:, 20] += ahead
    logits, targets = torch.cat([first, first + 0.01 * torch.randn(3, 37)]), torch.zeros(3).long()
    options: Any = ("kl", -100, 0.0)
    scales = (torch.tensor(0.0), torch.tensor(1.0))
    *_, kept = triton_loss.forward(logits, targets, torch.tensor(1.0), *options)
    *_, nothing = consistency.eager_forward(logits, targets, torch.tensor(1.0), *options)
    leaf = logits.double().requires_grad_()
    (exact,) = torch.autograd.grad(divergence(*leaf.chunk(2)), leaf)
    for module, statistics in ((triton_loss, kept), (consistency, nothing)):
        backward = getattr(module, "cross_entropy_consistency_backward", consistency.eager_backward)
        got = backward(logits, targets, statistics, *scales, *options)
        unit = exact.abs().amax(1, keepdim=True)
        # One class in 3e12 has the gradient; the logits' own rounding moves it by some 1e-5.
        assert ((got - exact) / unit).abs().max() < 2e-4


@pytest.mark.parametrize("shift", [0.0, 3000.0, -60.0])
@pytest.mark.parametrize("step", [0.01, 0.6, 2.0])
def test_sums_that_rising_entries_add_to(
    shift: float, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block has larger entries than the last, some of them within what is added without a new measure."""
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    monkeypatch.setattr(triton_loss, "BLOCKS", {1: 16, 4: 16})
    torch.manual_seed(1)
    rising = step * (torch.arange(96) // 16) + 0.1 * torch.randn(6, 96)
    logits, targets = rising + shift, torch.tensor([1, 40, 95])
    other = logits.clone()
    other[3:, 90] += 9.0  # the second view is sure of another class
    for given in (logits, other):
        for distance in consistency.DISTANCES:
            options = (distance, -100, 0.0)
            *results, kept = triton_loss.forward(given, targets, torch.tensor(0.5), *options)
            gradient = triton_loss.backward(
                given, targets, kept, torch.tensor(1.0), torch.tensor(0.5), *options
            )
            wide = given.double().requires_grad_()
            exact = consistency.reference(wide, targets, torch.tensor(0.5), *options)
            (slope,) = torch.autograd.grad(exact[0], wide)
            found, true = (*results, gradient), [*(one.detach() for one in exact), slope]
            for got, want, units in zip(found, true, (8.0, 8.0, 16.0, 24.0), strict=True):
                rows = [one.reshape(one.shape[0] if one.dim() else 1, -1) for one in (got, want)]
                assert float(errors(*rows).max()) <= units
