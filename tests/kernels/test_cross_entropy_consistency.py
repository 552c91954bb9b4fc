"""Cross-entropy with a consistency term: stored numbers, torch's cross-entropy, degenerate targets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.loss.cross_entropy_consistency import (
    DISTANCES,
    cross_entropy_consistency,
    reference,
)

WEIGHT = torch.tensor(0.5)


def unpack(stored: dict[str, Any]) -> Tensor:
    return torch.tensor(stored["data"], dtype=torch.float64).view(stored["shape"])


@pytest.mark.parametrize("name", ["mse", "mse_3d"])
def test_stored_mean_squared_error(stored: Callable[[str], Any], name: str) -> None:
    case = stored("regularizers")["pace"][name]
    views = torch.cat([unpack(case["l1"]), unpack(case["l2"])]).requires_grad_()
    targets = torch.zeros(views.shape[0] // 2, *views.shape[1:-1], dtype=torch.long)
    _, _, consistency = cross_entropy_consistency(views, targets, WEIGHT.double())
    # The stored numbers were computed in float32.
    assert consistency.item() == pytest.approx(case["loss"], rel=1e-6)
    if "grad_l1" in case:
        (grad,) = torch.autograd.grad(consistency, views)
        want = torch.cat([unpack(case["grad_l1"]), unpack(case["grad_l2"])])
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-6)


def test_stored_symmetric_divergence(stored: Callable[[str], Any]) -> None:
    case = stored("regularizers")["relatives"]["rdrop_official_readme"]
    views = torch.cat([unpack(case["p"]), unpack(case["q"])]).requires_grad_()
    targets = torch.zeros(views.shape[0] // 2, dtype=torch.long)
    _, _, consistency = cross_entropy_consistency(views, targets, WEIGHT.double(), "kl")
    assert consistency.item() == pytest.approx(case["loss_batchmean"], rel=1e-6)
    (grad,) = torch.autograd.grad(consistency, views)
    want = torch.cat([unpack(case["grad_p_sum"]), unpack(case["grad_q_sum"])]) / targets.numel()
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def test_stored_label_smoothing(stored: Callable[[str], Any]) -> None:
    case = stored("regularizers")["relatives"]["label_smoothing_torch"]
    logits = unpack(case["logits"])
    views = torch.cat([logits, logits])
    got = cross_entropy_consistency(
        views, torch.tensor(case["y"]), WEIGHT, label_smoothing=case["eps"]
    )
    assert float(got[1]) == pytest.approx(case["loss"], rel=1e-6)
    assert float(got[2]) == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("distance", DISTANCES)
def test_task_is_cross_entropy(smoothing: float, distance: str) -> None:
    # Far from zero, and certain of a class: neither may cost digits.
    logits = torch.randn(8, 11).mul_(3).add_(100)
    logits[0, 3], targets = 130.0, torch.tensor([3, -100, 0, 10])
    _, cross_entropy, _ = cross_entropy_consistency(
        logits, targets, WEIGHT, distance, label_smoothing=smoothing
    )
    want = functional.cross_entropy(logits[:4].double(), targets, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy.double(), want, rtol=2e-6, atol=0)


def test_divergence_of_views_a_constant_apart() -> None:
    torch.manual_seed(0)
    first = torch.randn(6, 50)
    second = first + 1e-2 * torch.randn(6, 50) + 10
    logits = torch.cat([first, second]).requires_grad_()
    targets = torch.zeros(6, dtype=torch.long)
    got = cross_entropy_consistency(logits, targets, WEIGHT, "kl")[2]
    exact = logits.detach().double().requires_grad_()
    want = reference(exact, targets, WEIGHT.double(), "kl")[2]
    assert got.item() == pytest.approx(want.item(), rel=1e-3)
    grads = torch.autograd.grad(got, logits)[0].double(), torch.autograd.grad(want, exact)[0]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("classes", [1, 3, 127])
def test_odd_sizes(distance: str, classes: int) -> None:
    for shape in ((1,), (3,), (127,), (3, 1), (1, 127)):
        torch.manual_seed(0)
        logits = torch.randn(2 * shape[0], *shape[1:], classes, dtype=torch.float64)
        logits.requires_grad_()
        targets = torch.randint(0, classes, shape)
        weight = torch.tensor(0.3, dtype=torch.float64)
        got = cross_entropy_consistency(logits, targets, weight, distance, label_smoothing=0.1)
        want = reference(logits, targets, weight, distance, label_smoothing=0.1)
        torch.testing.assert_close(got, want)
        pair = (torch.autograd.grad(results[0], logits) for results in (got, want))
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_in_several_blocks(distance: str) -> None:
    logits = torch.randn(90, 6000, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 6000, (45,))
    results = [f(logits, targets, WEIGHT.double(), distance)
               for f in (cross_entropy_consistency, reference)]  # fmt: skip
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r[0], logits) for r in results))


@pytest.mark.parametrize("distance", DISTANCES)
def test_all_targets_ignored(distance: str) -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    targets = torch.full((2,), -100)
    loss, cross_entropy, consistency = cross_entropy_consistency(logits, targets, WEIGHT, distance)
    plain = functional.cross_entropy(logits[:2], targets)
    assert torch.isnan(torch.stack([loss, cross_entropy, consistency, plain])).all()
    assert not torch.autograd.grad(plain, logits)[0].any()
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("held", [0.0, 1e4, -float("inf"), float("nan")])
@pytest.mark.parametrize("distance", DISTANCES)
def test_ignored_rows_change_nothing_whatever_they_hold(distance: str, held: float) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 7, dtype=torch.float64)
    targets, more = torch.tensor([1, 6, 0]), torch.full((2,), -100)
    short = torch.cat([first, second]).requires_grad_()
    rest = torch.full((2, 7), held, dtype=torch.float64)
    long = torch.cat([first, rest, second, rest.neg()]).requires_grad_()
    want = cross_entropy_consistency(short, targets, WEIGHT.double(), distance)
    got = cross_entropy_consistency(long, torch.cat([targets, more]), WEIGHT.double(), distance)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (wanted,) = torch.autograd.grad(want[0], short)
    (found,) = torch.autograd.grad(got[0], long)
    torch.testing.assert_close(found[[0, 1, 2, 5, 6, 7]], wanted, rtol=1e-12, atol=0)
    assert not found[[3, 4, 8, 9]].any()


def test_both_views_receive_opposite_consistency_gradients() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    _, _, consistency = cross_entropy_consistency(logits, torch.zeros(3, dtype=torch.long), WEIGHT)
    (grad,) = torch.autograd.grad(consistency, logits)
    assert torch.equal(grad[:3], -grad[3:])
    assert grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_low_precision_is_no_worse_than_torch(dtype: torch.dtype, distance: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 127).to(dtype).requires_grad_()
    targets = torch.randint(0, 127, (6,))
    ours = cross_entropy_consistency(logits, targets, WEIGHT, distance)
    low = reference(logits, targets, WEIGHT.to(dtype), distance)
    exact = reference(logits.double(), targets, WEIGHT.double(), distance)
    assert ours[0].dtype == torch.float32
    grads = [torch.autograd.grad(r[0], logits)[0].double() for r in (ours, low, exact)]
    for mine, torchs, true in ((ours[0], low[0], exact[0]), grads):
        error, allowed = (v.double().sub(true).abs().max() for v in (mine, torchs))
        assert error <= 2 * allowed + 1e-4


def test_views_that_do_not_match_are_named() -> None:
    with pytest.raises(RuntimeError, match="two views, for targets"):
        cross_entropy_consistency(torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), WEIGHT)
    with pytest.raises(RuntimeError, match="distance must be one of"):
        cross_entropy_consistency(torch.zeros(4, 3), torch.zeros(2, dtype=torch.long), WEIGHT, "l1")
