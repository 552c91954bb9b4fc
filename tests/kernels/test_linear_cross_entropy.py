"""Cross-entropy through the head in chunks: F.cross_entropy of the logits, which are never held."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.test_linear_cross_entropy_consistency import Largest
from trainc.kernels.loss import linear_cross_entropy as operators
from trainc.kernels.loss import linear_cross_entropy_consistency as of_views

linear_cross_entropy: Any = operators.linear_cross_entropy


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Hidden states, head and bias with gradients, targets with some ignored."""
    torch.manual_seed(0)
    made = [torch.randn(4, 3, 8), torch.randn(21, 8) / 2, torch.randn(21)]
    targets = torch.randint(0, 21, (4, 3))
    targets[0, :2] = -100
    return [t.to(dtype).requires_grad_() for t in made], targets


def torchs(leaves: list[Tensor], targets: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = functional.linear(*leaves).flatten(0, 1)
    return functional.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)


@pytest.mark.parametrize("chunks", [0, 1, 2, 5, 12, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_every_chunking_is_torchs(smoothing: float, chunks: int) -> None:
    leaves, targets = problem()
    got = linear_cross_entropy(*leaves, targets, -100, smoothing, chunks)
    want = torchs(leaves, targets, smoothing)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(-3 * loss, leaves) for loss in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    leaves, targets = problem(dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    losses = linear_cross_entropy(*leaves, targets, chunks=3), torchs(leaves, targets)
    true = torchs(exact, targets)
    assert losses[0].dtype == torch.float32
    ours, low = (torch.autograd.grad(loss, leaves) for loss in losses)
    wanted = torch.autograd.grad(true, exact)
    for mine, torch_s, want in ((*losses, true), *zip(ours, low, wanted, strict=True)):
        error, allowed = (v.double().sub(want).abs().max() for v in (mine, torch_s))
        assert error <= 2 * allowed + 1e-6
    assert {grad.dtype for grad in ours} == {dtype}


def test_small_float16_gradients_and_a_loss_scale_survive() -> None:
    """Of many rows and classes: p / rows, 1e-7 here, is denormal in float16, and so is p before it is lifted."""
    torch.manual_seed(0)
    hidden, head = (torch.randn(64, 4) / 9).half(), (torch.randn(20000, 4) / 9).half()
    bias, targets = torch.zeros(20000).half().requires_grad_(), torch.zeros(64).long()
    loss = linear_cross_entropy(hidden, head, bias, targets, chunks=4)
    (scaled,) = torch.autograd.grad(loss * 2.0**14, bias)
    exact = bias.detach().double().requires_grad_()
    logits = functional.linear(hidden.double(), head.double(), exact)
    (want,) = torch.autograd.grad(functional.cross_entropy(logits, targets), exact)
    torch.testing.assert_close(scaled.double() / 2**14, want, rtol=3e-3, atol=0)


def test_no_tensor_is_as_large_as_the_logits() -> None:
    leaves = torch.randn(400, 10), torch.randn(500, 10), torch.randn(500)
    numbers = torch.randint(500, (400,)), -100, 0.1, 50
    with Largest() as mode:  # type: ignore[no-untyped-call]
        torch.ops.trainc.linear_cross_entropy(*leaves, *numbers, [True, True, True])
    assert mode.elements == 500 * 10  # the head's gradient, for 200,000 logits: a chunk has 4,000


def test_only_what_wants_a_gradient_gets_one_and_it_must_say_so_before() -> None:
    leaves, targets = problem()
    want = torch.autograd.grad(torchs(leaves, targets), leaves)
    for kept in range(3):
        given = [t if i == kept else t.detach() for i, t in enumerate(leaves)]
        loss = linear_cross_entropy(*given, targets, chunks=2)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves[kept])[0], want[kept])
    rest = targets, -100, 0.0, 2, [True, False, False]
    loss = torch.ops.trainc.linear_cross_entropy(*leaves, *rest)[0]
    with pytest.raises(RuntimeError, match="require gradients before the call"):
        loss.backward()
    with torch.no_grad():
        assert not linear_cross_entropy(*leaves, targets).requires_grad


def test_targets_that_are_all_ignored_or_none() -> None:
    leaves, targets = problem()
    loss = linear_cross_entropy(*leaves, torch.full_like(targets, -100))
    assert loss.isnan()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))
    empty = leaves[0].detach()[:0].requires_grad_()
    nothing = linear_cross_entropy(empty, *leaves[1:], targets[:0], chunks=3)
    assert nothing.isnan()
    assert torch.autograd.grad(nothing, empty)[0].shape == empty.shape


def test_rows_that_are_ignored_may_hold_anything() -> None:
    leaves, targets = problem()
    odd = leaves[0].detach().clone()
    odd[targets == -100] = float("inf")
    given = [odd.requires_grad_(), *leaves[1:]]
    loss = linear_cross_entropy(*given, targets)
    torch.testing.assert_close(loss, torchs(leaves, targets))
    (found,) = torch.autograd.grad(loss, leaves[2])
    torch.testing.assert_close(found, torch.autograd.grad(torchs(leaves, targets), leaves[2])[0])


def test_autocast_casts_as_a_linear_layer_does() -> None:
    leaves, targets = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(*leaves, targets)
        logits = functional.linear(*leaves)
    want = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert {g.dtype for g in torch.autograd.grad(got, leaves)} == {torch.float32}


def test_arguments_that_do_not_fit_are_named() -> None:
    (hidden, head, bias), targets = problem()
    for given, message in (
        ((hidden, head, bias, targets[:3]), r"hidden must be \(B, ..., K\) for targets"),
        ((hidden, head.t(), bias, targets), r"must be \(C, K\) for hidden"),
        ((hidden, head, bias[:2], targets), "bias must have the shape"),
        ((hidden, head.float(), bias, targets), "must have the dtype of hidden"),
        ((hidden, head[:0], bias[:0], targets), "has no class"),
        ((hidden, head, bias, targets, -100, 1.5), r"in \[0, 1\], not 1.5"),
        ((hidden, head, bias, targets, -100, 0.0, -1), "0 or more, not -1"),
        ((hidden, head, bias, targets + 30), "out of bounds"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear_cross_entropy(*given)


def test_chunks_by_size_have_rows_enough_for_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_views, "CHUNK_CPU", 21 * 4)
    leaves, _ = problem()
    rows = leaves[0].detach().flatten(0, 1)
    parts = [part for part, _ in operators._chunks(rows, leaves[1].detach(), None, 0)]
    assert [part.stop - part.start for part in parts] == [8, 4]
