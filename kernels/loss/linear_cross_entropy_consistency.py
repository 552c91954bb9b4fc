"""Cross-entropy and consistency of two views through the head: the logits are never held at once.

Rows of both views are taken in chunks: logits, losses, and the next chunk in the same memory.
Backward makes a chunk's logits again and turns them into their gradient in place. That is 4 products
of the head's size, where keeping all logits takes 3. Making the gradients in forward would take 3 as
well, but loss, cross-entropy and consistency may each be differentiated by their own factor: it would take 5
for both parts, float16 gradients would be rounded before a loss scale can lift them off zero, and
the head's gradient would be held (4 C K bytes) from then on, also where nobody differentiates.
Whatever the dtype, statistics and the head's and the bias's gradient are summed in float32 (float64).
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import (
    REDUCED,
    absent,
    accumulation_dtype,
    autocast,
    check_bias,
    require,
)
from trainc.kernels.library.register import register
from trainc.kernels.loss import cross_entropy_consistency as plain
from trainc.kernels.loss import row_losses

__all__ = ["linear_cross_entropy_consistency"]

# Logits of a chunk. A chunk's rows are at least the width of the head: each chunk reads the head
# twice and adds once to its gradient, C K numbers, which should not outweigh its own logits.
CHUNK_CPU = 1 << 20
CHUNK_DEVICE = 1 << 27


def linear_cross_entropy_consistency(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `cross_entropy_consistency` of hidden @ head.T + bias without ever holding all logits.

    `hidden` is (2B, ..., K) with view one in the first half, `head` (C, K) and `bias` (C,) or None, of one floating
    dtype, which the logits have too (under autocast its 16-bit one); `targets` is (B, ...), int64 class indices in
    [0, C) or `ignore_index`, which does not count; `weight` is 0-d and multiplies the consistency. `distance` is "mse",
    squared differences of logits summed over classes, or "kl", the mean of both divergences of the softmaxes;
    `label_smoothing`, in [0, 1], is F.cross_entropy's.

    Returns (loss, cross_entropy, consistency), 0-d in float32 (float64 for float64 hidden): cross_entropy + weight *
    consistency, view one's mean cross-entropy and the mean distance, both over targets that count. Each can be
    differentiated; hidden, head, bias and weight get the gradients that they would through all logits. Without a
    target that counts all three are nan.

    Raises RuntimeError for arguments outside of this, for a target outside of [0, C) on a CPU (on CUDA cross_entropy
    becomes nan, or in float64 a device assertion fails) and for second derivatives, and NotImplementedError for
    forward-mode ones.

    Source of the distances: PACE, Ni et al. 2024, arXiv:2409.17137, eq. 12; R-Drop, Liang et al. 2021,
    arXiv:2106.14448.
    """
    cast = autocast(hidden, head, bias)  # as F.linear; the weight of the distance stays as it is
    loss, cross_entropy, consistency, _ = _forward_op(
        *cast, targets, weight, distance, ignore_index, label_smoothing
    )
    return loss, cross_entropy, consistency


def reference(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in differentiable PyTorch, in the dtype of the hidden states."""
    logits = functional.linear(hidden, head, bias)
    return plain.reference(logits, targets, weight, distance, ignore_index, label_smoothing)


def chunk_rows(width: int, classes: int, device: str) -> int:
    """How many rows of each view make a chunk."""
    held = CHUNK_CPU if device == "cpu" else CHUNK_DEVICE
    return max(1, width // 2, held // max(2 * classes, 1))


def _check(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    distance: str,
    label_smoothing: float,
) -> None:
    plain.check((*hidden.shape[:-1], head.shape[0]), targets, weight, distance, label_smoothing)
    check_head(hidden, head, bias, "(2B, ..., K)")


def check_head(hidden: Tensor, head: Tensor, bias: Tensor | None, shape: str) -> None:
    """Reject a head and bias that do not fit hidden states, whose shape messages write as `shape`."""
    require(
        head.dim() == 2 and head.shape[1] == hidden.shape[-1],
        lambda: (
            f"head must be (C, K) for hidden {shape}, not {tuple(head.shape)} for {tuple(hidden.shape)}"
        ),
    )
    check_bias(bias, head)
    require(
        head.dtype == hidden.dtype and (bias is None or bias.dtype == hidden.dtype),
        lambda: (
            f"head and bias must have the dtype of hidden, {hidden.dtype}, "
            f"not {[t.dtype for t in (head, bias) if t is not None]}"
        ),
    )


def _chunks(
    hidden: Tensor, head: Tensor, bias: Tensor | None, count: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of view one, and hidden states (2n, K) and logits (2n, C) of both views for them.

    The logits of every chunk lie in the same memory: a chunk is over when the next is asked for.
    """
    views = hidden.reshape(2, count, hidden.shape[-1])
    size = min(count, chunk_rows(head.shape[1], head.shape[0], hidden.device.type))
    held = hidden.new_empty((2 * size, head.shape[0]))
    for start in range(0, count, max(size, 1)):
        part = slice(start, min(start + size, count))
        x = views[:, part].reshape(-1, views.shape[2])
        logits = held[: x.shape[0]]
        if bias is None:
            torch.mm(x, head.t(), out=logits)
        else:
            torch.addmm(bias, x, head.t(), out=logits)
        yield part, x, logits


def _rowwise(like: Tensor) -> Any:
    """The module whose `row_losses`, `means`, `row_factors` and `write_gradients` serve these logits."""
    if like.is_cuda and torch.version.hip is None and like.dtype != torch.float64:
        return import_module("trainc.kernels.loss.triton_cross_entropy_consistency")
    return row_losses


def eager_forward(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, weight: Tensor,
    distance: str, ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, cross_entropy and consistency, and what CUDA's backward keeps of the rows."""
    _check(hidden, head, bias, targets, weight, distance, label_smoothing)
    labels, kernels = targets.reshape(-1), _rowwise(hidden)
    cross_entropies = hidden.new_empty(labels.shape, dtype=accumulation_dtype(hidden.dtype))
    distances = torch.empty_like(cross_entropies)
    statistics = cross_entropies.new_zeros((labels.shape[0], plain.STATISTICS[distance]))
    for part, _, logits in _chunks(hidden, head, bias, labels.shape[0]):
        cross_entropies[part], distances[part] = kernels.row_losses(
            logits, labels[part], distance, ignore_index, label_smoothing, statistics[part]
        )
    return *kernels.means(cross_entropies, distances, labels, weight, ignore_index), statistics


def fake_forward(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, weight: Tensor,
    distance: str, ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(hidden, head, bias, targets, weight, distance, label_smoothing)
    return plain.fake_results(hidden, targets, distance)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right to `total`, in its dtype."""
    if left.dtype not in REDUCED:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        total.add_(torch.mm(left.t(), right, out_dtype=torch.float32))
    else:
        total.addmm_(left.t().float(), right.float())


def eager_backward(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, statistics: Tensor,
    cross_entropy_factor: Tensor, consistency_factor: Tensor, distance: str, ignore_index: int,
    label_smoothing: float, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of cross_entropy_factor * cross_entropy + consistency_factor * consistency.

    They are those of hidden, head and bias; what `mask` does not ask for has no elements.
    """
    labels, kernels, (classes, width) = targets.reshape(-1), _rowwise(hidden), head.shape
    count, dtype = labels.shape[0], accumulation_dtype(hidden.dtype)
    dhidden = hidden.new_empty((2, count, width) if mask[0] else (0,))
    dhead = head.new_zeros((classes, width) if mask[1] else (0,), dtype=dtype)
    dbias = head.new_zeros((classes,) if mask[2] else (0,), dtype=dtype)
    factors = kernels.row_factors(cross_entropy_factor, consistency_factor, labels, ignore_index)
    options = (distance, ignore_index, label_smoothing)
    for part, x, logits in _chunks(hidden, head, bias, count):
        kernels.write_gradients(
            logits, labels[part], *factors, *options, statistics[part], out=logits
        )
        if mask[0]:
            dhidden[:, part] = torch.mm(logits, head).view(2, -1, width)
        if mask[1]:
            add_product(dhead, logits, x)
        if mask[2]:
            dbias.add_(logits.sum(0, dtype=dtype))
    shaped = dhidden.view(hidden.shape) if mask[0] else dhidden
    return shaped, dhead.to(head.dtype), dbias.to(head.dtype)


def fake_backward(hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mask = rest[-1]
    dhidden = hidden.new_empty(hidden.shape) if mask[0] else absent(hidden)
    dhead = head.new_empty(head.shape) if mask[1] else absent(head)
    dbias = head.new_empty(head.shape[:1]) if mask[2] else absent(head)
    return dhidden, dhead, dbias


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, head, bias, targets, weight, *options = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(hidden, head, bias, targets, output[3], weight, output[2])
    ctx.options = tuple(options)


def _backward(ctx, dloss, dcross_entropy, dconsistency, _):  # type: ignore[no-untyped-def]
    *inputs, weight, consistency = ctx.saved_tensors
    wants = ctx.needs_input_grad
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(wants[:3]):
        factors = (dloss + dcross_entropy, dloss * weight + dconsistency)
        found = _backward_op(*inputs, *factors, *ctx.options, list(wants[:3]))
        grads = tuple(g if wanted else None for g, wanted in zip(found, wants[:3], strict=True))
    dweight = (dloss * consistency).to(weight.dtype) if wants[4] else None
    return *grads, None, dweight, None, None, None


# CUDA takes cuBLAS and, row by row, the Triton kernels of the loss: see `_rowwise`.
_forward_op = register(
    "linear_cross_entropy_consistency",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register(
    "linear_cross_entropy_consistency_backward",
    cpu=eager_backward,
    cuda=eager_backward,
    fake=fake_backward,
)
