"""Cross-entropy and consistency of two views of a batch; one backward pass writes the gradient of both."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype, lazy, require
from trainc.kernels.library.register import register
from trainc.kernels.loss import row_losses

__all__ = ["cross_entropy_consistency"]

DISTANCES = ("mse", "kl")
# What CUDA's backward keeps of a row: largest logit and log sum exp of the rest, for "kl" of both
# views, each with the other view's logit there and the mean of the log ratio counted from there.
STATISTICS = {"mse": 2, "kl": 8}


def cross_entropy_consistency(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cross-entropy on one view plus a weighted distance between two views of the same batch.

    `logits` is (2B, ..., C), floating, with view one in the first half; `targets` is (B, ...), int64 class indices in
    [0, C) or `ignore_index`; `weight` is 0-d. `distance` is "mse" or "kl"; `label_smoothing`, in [0, 1], is
    F.cross_entropy's. Returns (loss, cross_entropy, consistency), 0-d in float32 (float64 for float64 logits):

      cross_entropy  mean cross-entropy of view one over targets that are not `ignore_index`
      consistency    mean over targets that are not `ignore_index` of the distance of the two views there:
                     "mse"  sum over classes of (l1 - l2)^2, raw logits (PACE, Ni et al. 2024, arXiv:2409.17137, eq. 12)
                     "kl"   (KL(p || q) + KL(q || p)) / 2 of the softmaxes p and q (R-Drop, Liang et al. 2021,
                            arXiv:2106.14448)
      loss           cross_entropy + weight * consistency

    Each of the three can be differentiated; both views get gradient (nothing is detached), and so does weight. As with
    F.cross_entropy, no target to average over makes all three nan, and the gradient zero. Classes masked
    by -inf in both views leave cross_entropy as F.cross_entropy has it and make consistency (and loss) nan.

    Raises RuntimeError for arguments outside of this, for a target outside of [0, C) on a CPU (on CUDA cross_entropy
    becomes nan, or in float64 a device assertion fails) and for second derivatives, and NotImplementedError for
    forward-mode ones.
    """
    loss, cross_entropy, consistency, _ = _forward_op(
        logits, targets, weight, distance, ignore_index, label_smoothing
    )
    return loss, cross_entropy, consistency


def reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in differentiable PyTorch, in the dtype of the logits."""
    first, second = (half.flatten(0, -2) for half in logits.chunk(2))
    kept = targets.flatten() != ignore_index
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    chosen = log_p.gather(1, targets.flatten().where(kept, 0).unsqueeze(1)).squeeze(1)
    each = -(1 - label_smoothing) * chosen - label_smoothing * log_p.mean(1)
    cross_entropy = each.where(kept, 0).sum() / kept.sum()
    if distance == "mse":
        apart = (first - second).square().sum(1)
    else:
        apart = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2
    consistency = apart.where(kept, 0).sum() / kept.sum()
    return cross_entropy + weight * consistency, cross_entropy, consistency


def check(
    shape: Sequence[int],
    targets: Tensor,
    weight: Tensor,
    distance: str,
    label_smoothing: float,
) -> None:
    """Reject arguments outside the contract, given the shape of two views of rows."""
    require(
        0.0 <= label_smoothing <= 1.0,
        lambda: f"label_smoothing must be in [0, 1], not {label_smoothing}",
    )
    require(distance in DISTANCES, lambda: f"distance must be one of {DISTANCES}, not {distance!r}")
    require(
        len(shape) >= 2
        and len(shape) == targets.dim() + 1
        and shape[0] == 2 * targets.shape[0]
        and tuple(shape[1:-1]) == tuple(targets.shape[1:]),
        lambda: (
            f"logits must be (2B, ..., C), two views, for targets (B, ...), not {tuple(shape)} "
            f"for {tuple(targets.shape)}"
        ),
    )
    require(shape[-1] > 0, lambda: f"logits {tuple(shape)} have no class: their last dim is 0")
    require(weight.dim() == 0, lambda: f"weight must be a 0-d tensor, not {tuple(weight.shape)}")


def no_statistics(rows: Tensor, distance: str) -> Tensor:
    """Zeros (n, STATISTICS) for logits (2n, C): on a CPU, backward computes what it needs from the logits."""
    shape = (rows.shape[0] // 2, STATISTICS[distance])
    return rows.new_zeros(shape, dtype=accumulation_dtype(rows.dtype))


def fake_results(
    like: Tensor, targets: Tensor, distance: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten results: three numbers, and what CUDA's backward keeps of the rows."""
    dtype = accumulation_dtype(like.dtype)
    loss, cross_entropy, consistency = (like.new_empty((), dtype=dtype) for _ in range(3))
    kept = like.new_empty((targets.numel(), STATISTICS[distance]), dtype=dtype)
    return loss, cross_entropy, consistency, kept


def eager_forward(
    logits: Tensor, targets: Tensor, weight: Tensor, distance: str, ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, cross_entropy and consistency, and what CUDA's backward keeps of the rows."""
    check(logits.shape, targets, weight, distance, label_smoothing)
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    found = row_losses.row_losses(rows, labels, distance, ignore_index, label_smoothing)
    return *row_losses.means(*found, labels, weight, ignore_index), no_statistics(rows, distance)


def fake_forward(
    logits: Tensor, targets: Tensor, weight: Tensor, distance: str, ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(logits.shape, targets, weight, distance, label_smoothing)
    return fake_results(logits, targets, distance)


def eager_backward(
    logits: Tensor, targets: Tensor, statistics: Tensor, cross_entropy_factor: Tensor,
    consistency_factor: Tensor, distance: str, ignore_index: int, label_smoothing: float,
) -> Tensor:  # fmt: skip
    """The gradient of cross_entropy_factor * cross_entropy + consistency_factor * consistency, like the logits."""
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    result = rows.new_empty(rows.shape)
    factors = row_losses.row_factors(cross_entropy_factor, consistency_factor, labels, ignore_index)
    row_losses.write_gradients(
        rows, labels, *factors, distance, ignore_index, label_smoothing, out=result
    )
    return result.view(logits.shape)


def fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, targets, weight, *options = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(logits, targets, output[3], weight, output[2])
    ctx.options = tuple(options)


def _backward(ctx, dloss, dcross_entropy, dconsistency, _):  # type: ignore[no-untyped-def]
    *inputs, weight, consistency = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dlogits = None
    if wants[0]:
        factors = (dloss + dcross_entropy, dloss * weight + dconsistency)
        dlogits = _backward_op(*inputs, *factors, *ctx.options)
    dweight = (dloss * consistency).to(weight.dtype) if wants[2] else None
    return dlogits, None, dweight, None, None, None


# No autocast rule: 16-bit logits are read as they are, and every sum is float32 already.
_forward_op = register(
    "cross_entropy_consistency",
    cpu=eager_forward,
    cuda=lazy("loss.triton_cross_entropy_consistency", "forward"),
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register(
    "cross_entropy_consistency_backward",
    cpu=eager_backward,
    cuda=lazy("loss.triton_cross_entropy_consistency", "backward"),
    fake=fake_backward,
)
