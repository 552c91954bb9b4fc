"""The loss through the head: the loss of its logits, whatever the chunks, and never the logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainc.kernels.loss import linear_cross_entropy_consistency as operators
from trainc.kernels.loss import row_losses
from trainc.kernels.loss.cross_entropy_consistency import DISTANCES, cross_entropy_consistency

WEIGHT = torch.tensor(0.4)
# Called with lists of tensors, which have no types of their own.
linear_cross_entropy_consistency: Any = operators.linear_cross_entropy_consistency
reference: Any = operators.reference


@pytest.fixture(params=[1, 2, 3, 100], ids=lambda rows: f"rows-{rows}")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows of a chunk: several chunks, a shorter last one, or one of all."""
    monkeypatch.setattr(operators, "chunk_rows", lambda *_: request.param)
    return request.param


def problem(
    shape: tuple[int, ...], width: int, classes: int, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any, Any]:
    """Hidden states, head, bias and weight with gradients, targets with some ignored."""
    torch.manual_seed(len(shape) + width + classes)
    made = [torch.randn(2 * shape[0], *shape[1:], width), torch.randn(classes, width) / 2]
    made.append(torch.randn(classes))
    leaves = [t.to(dtype).requires_grad_() for t in made]
    targets = torch.randint(0, classes, shape)
    targets.view(-1)[1:2] = -100
    return leaves, targets, WEIGHT.double().requires_grad_()


def combined(results: tuple[Tensor, ...]) -> Tensor:
    """All three results, each differentiated by a factor of its own."""
    return sum((factor * r for factor, r in zip((0.7, -1.3, 2.1), results, strict=True)), WEIGHT)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 2)], ids=str)
def test_every_chunking_gives_the_definition(
    shape: tuple[int, ...], smoothing: float, distance: str, rows: int
) -> None:
    leaves, targets, weight = problem(shape, 5, 9)
    options = (distance, -100, smoothing)
    got = linear_cross_entropy_consistency(*leaves, targets, weight, *options)
    want = reference(*leaves, targets, weight, *options)
    if (targets != -100).any():
        torch.testing.assert_close(got, want)
        wanted = [*leaves, weight]
        grads = (torch.autograd.grad(combined(r), wanted) for r in (got, want))
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one(rows: int) -> None:
    leaves, targets, _ = problem((5,), 4, 6)
    want = torch.autograd.grad(reference(*leaves, targets, WEIGHT)[0], leaves)
    for kept in range(3):
        given = [t if i == kept else t.detach() for i, t in enumerate(leaves)]
        loss, *_ = linear_cross_entropy_consistency(*given, targets, WEIGHT)
        (grad,) = torch.autograd.grad(loss, leaves[kept])
        torch.testing.assert_close(grad, want[kept])


@pytest.mark.parametrize("distance", DISTANCES)
def test_all_targets_ignored_and_none_given(distance: str, rows: int) -> None:
    leaves, targets, weight = problem((3,), 4, 6)
    ignored = torch.full_like(targets, -100)
    loss, cross_entropy, consistency = linear_cross_entropy_consistency(
        *leaves, ignored, weight, distance
    )
    assert torch.isnan(torch.stack([loss, cross_entropy, consistency])).all()
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))
    empty = leaves[0].detach()[:0].requires_grad_()
    nothing = linear_cross_entropy_consistency(empty, *leaves[1:], targets[:0], weight, distance)
    assert torch.isnan(torch.stack(nothing)).all()
    grads = torch.autograd.grad(nothing[0], [empty, *leaves[1:]])
    assert [tuple(g.shape) for g in grads] == [(0, 4), (6, 4), (6,)]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_precision_is_no_worse_than_torch(dtype: torch.dtype, distance: str, rows: int) -> None:
    leaves, targets, _ = problem((10,), 33, 127, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ours = linear_cross_entropy_consistency(*leaves, targets, WEIGHT, distance)
    low = reference(*leaves, targets, WEIGHT.to(dtype), distance)
    true = reference(*exact, targets, WEIGHT.double(), distance)
    assert {r.dtype for r in ours} == {torch.float32}
    found = (torch.autograd.grad(r[0], given) for r, given in
             ((ours, leaves), (low, leaves), (true, exact)))  # fmt: skip
    for mine, torchs, want in ((ours[0], low[0], true[0]), *zip(*found, strict=True)):
        error, allowed = (v.double().sub(want).abs().max() for v in (mine, torchs))
        rounding = (5e-5 if dtype != torch.float32 else 1e-6) * max(
            1.0, float(want.detach().abs().max())
        )
        assert error <= 2 * allowed + rounding
        assert mine.dtype == torch.float32 or mine.dtype == dtype


def test_a_loss_scale_lifts_float16_gradients_off_zero(rows: int) -> None:
    leaves, targets, _ = problem((7,), 8, 50, torch.float16)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(1e-3)
    loss, *_ = linear_cross_entropy_consistency(*leaves, targets, WEIGHT * 0)
    scaled = torch.autograd.grad(loss * 2.0**14, leaves[2])[0].double() / 2**14
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(reference(*exact, targets, WEIGHT.double() * 0)[0], exact[2])[0]
    torch.testing.assert_close(scaled, want, rtol=5e-3, atol=0)


def test_strided_inputs_change_nothing(rows: int) -> None:
    leaves, targets, weight = problem((3, 4), 5, 6)
    hidden = leaves[0].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    head = leaves[1].detach().t().contiguous().t().requires_grad_()
    turned = targets.t().contiguous().t()
    got = linear_cross_entropy_consistency(hidden, head, leaves[2], turned, weight)[0]
    want = linear_cross_entropy_consistency(*leaves, targets, weight)[0]
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, [hidden, head]), torch.autograd.grad(want, leaves[:2])
    torch.testing.assert_close(*grads)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    leaves, targets, _ = problem((5,), 8, 9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy_consistency(*leaves, targets, WEIGHT, "kl")
        logits = functional.linear(*leaves)
    assert logits.dtype == torch.bfloat16
    want = cross_entropy_consistency(logits, targets, WEIGHT, "kl")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(got[0], leaves)
    assert {g.dtype for g in grads} == {torch.float32}
    assert all(g.isfinite().all() for g in grads)


class Largest(TorchDispatchMode):
    """Notes the largest result of any call."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return found


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "CHUNK_CPU", 4000)
    made, targets, _ = problem((400,), 10, 500, torch.float32)
    leaves = [leaf.detach() for leaf in made]
    with Largest() as mode:  # type: ignore[no-untyped-call]
        given, options = (*leaves, targets), ("kl", -100, 0.0)
        loss, *_, kept = torch.ops.trainc.linear_cross_entropy_consistency(*given, WEIGHT, *options)
        torch.ops.trainc.linear_cross_entropy_consistency_backward(
            *given, kept, WEIGHT, WEIGHT, *options, [True, True, True]
        )
    assert loss.isfinite()
    # Hidden states, the head, a chunk of 8 rows and the buffers of a block, for 400,000 logits.
    assert mode.elements <= 4 * 4000 < 2 * 400 * 500 // 20


def test_a_chunk_has_rows_enough_for_the_head_it_reads() -> None:
    for width, classes in ((16, 50000), (768, 50257), (4096, 128000), (64, 10)):
        for device, held in (("cpu", operators.CHUNK_CPU), ("cuda", operators.CHUNK_DEVICE)):
            rows = 2 * operators.chunk_rows(width, classes, device)
            assert rows >= width
            assert rows * classes <= max(held, width * classes)


def test_arguments_that_do_not_fit_are_named() -> None:
    leaves, targets, _ = problem((4,), 3, 5, torch.float32)
    hidden, head, bias = leaves
    with pytest.raises(RuntimeError, match="two views, for targets"):
        linear_cross_entropy_consistency(hidden, head, bias, targets[:3], WEIGHT)
    with pytest.raises(RuntimeError, match=r"must be \(C, K\) for hidden"):
        linear_cross_entropy_consistency(hidden, head.t(), bias, targets, WEIGHT)
    with pytest.raises(RuntimeError, match="bias must have the shape"):
        linear_cross_entropy_consistency(hidden, head, bias[:2], targets, WEIGHT)
    with pytest.raises(RuntimeError, match="must have the dtype of hidden"):
        linear_cross_entropy_consistency(hidden.double(), head, bias, targets, WEIGHT)
    with pytest.raises(RuntimeError, match="distance must be one of"):
        linear_cross_entropy_consistency(hidden, head, bias, targets, WEIGHT, "l1")


@pytest.mark.interpreter
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_by_triton_in_place(
    distance: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "chunk_rows", lambda *_: 2)
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    monkeypatch.setattr(triton_loss, "BLOCKS", {1: 16, 4: 16})
    monkeypatch.setattr(triton_loss, "BACKWARD_BLOCK", 16)
    leaves, targets, _ = problem((3,), 5, 37, dtype)
    results, grads = [], []
    for rowwise in (triton_loss, row_losses):
        monkeypatch.setattr(operators, "_rowwise", lambda _, found=rowwise: found)
        found = linear_cross_entropy_consistency(
            *leaves, targets, WEIGHT, distance, label_smoothing=0.1
        )
        results.append(found)
        grads.append(torch.autograd.grad(combined(found), leaves))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*grads, strict=True):
        # The interpreter truncates to bfloat16, and what it truncates is summed over rows.
        tolerance = 2e-5 if dtype == torch.float32 else 5e-2
        limit = tolerance * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=limit)
