"""Cross-entropy through the head: the logits are never held at once.

Rows are taken in chunks: logits, losses, and the gradient of the losses in the same memory, which the products of the
head's and of the hidden states' gradients read at once. Forward has made every gradient when it returns, 3 products
of the head's size, and backward multiplies them by the factor of the loss. Gradients are made and held as those of the
sum over rows, times LIFT: dividing by the number of targets, or by a loss scale that is still to come, would round
16-bit ones to zero.
Whatever the dtype, losses and the head's and the bias's gradient are summed in float32 (float64).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import absent, accumulation_dtype, autocast, require
from trainc.kernels.library.register import register
from trainc.kernels.loss import linear_cross_entropy_consistency as of_views
from trainc.kernels.loss.row_losses import BLOCK_ELEMENTS

__all__ = ["linear_cross_entropy"]

# What the gradients of a sum over rows are multiplied by: probabilities of a large vocabulary are denormal in float16.
LIFT = {torch.float16: 2.0**8}


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunks: int = 0,
) -> Tensor:
    """Compute F.cross_entropy of hidden @ head.T + bias without ever holding all logits.

    `hidden` is (B, ..., K), `head` (C, K) and `bias` (C,) or None, of one floating dtype, which the logits have too
    (under autocast its 16-bit one); `targets` is (B, ...), int64 class indices in [0, C) or `ignore_index`, which does
    not count. `label_smoothing`, in [0, 1], is F.cross_entropy's. Rows are taken in `chunks` parts of equal size, or
    with 0 in parts of a size that suits the device.

    Returns the mean over targets that count, 0-d in float32 (float64 for float64 hidden). hidden, head and bias get the
    gradients that they would through all logits; they are made together with the loss, and held until backward.
    Without a target that counts the loss is nan and its gradient zero.

    Raises RuntimeError for arguments outside of this, for a target outside of [0, C) on a CPU (on CUDA a device
    assertion fails) and for second derivatives, and NotImplementedError for forward-mode ones.

    Source of making the gradients chunk by chunk in forward: Liger Kernel, Hsu et al. 2024, arXiv:2410.10989.
    """
    cast = autocast(hidden, head, bias)  # as F.linear
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in cast]
    loss: Tensor = _forward_op(*cast, targets, ignore_index, label_smoothing, chunks, wanted)[0]
    return loss


def reference(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definition in differentiable PyTorch, in the dtype of the hidden states."""
    log_p = functional.linear(hidden, head, bias).flatten(0, -2).log_softmax(-1)
    kept = targets.flatten() != ignore_index
    chosen = log_p.gather(1, targets.flatten().where(kept, 0).unsqueeze(1)).squeeze(1)
    each = -(1 - label_smoothing) * chosen - label_smoothing * log_p.mean(1)
    return each.where(kept, 0).sum() / kept.sum()


def _check(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    chunks: int,
) -> None:
    require(
        0.0 <= label_smoothing <= 1.0,
        lambda: f"label_smoothing must be in [0, 1], not {label_smoothing}",
    )
    require(chunks >= 0, lambda: f"chunks must be 0 or more, not {chunks}")
    require(
        hidden.dim() >= 2 and tuple(hidden.shape[:-1]) == tuple(targets.shape),
        lambda: (
            f"hidden must be (B, ..., K) for targets (B, ...), not {tuple(hidden.shape)} "
            f"for {tuple(targets.shape)}"
        ),
    )
    of_views.check_head(hidden, head, bias, "(B, ..., K)")
    require(head.shape[0] > 0, lambda: f"head {tuple(head.shape)} has no class")


def _chunks(
    rows: Tensor, head: Tensor, bias: Tensor | None, chunks: int
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their logits (n, C), which lie in the same memory for every chunk."""
    count, (classes, width) = len(rows), head.shape
    size = 2 * of_views.chunk_rows(width, classes, rows.device.type)
    size = max(1, min(count, -(-count // chunks) if chunks else size))
    held = rows.new_empty((min(count, size), classes))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        logits = held[: part.stop - start]
        if bias is None:
            torch.mm(rows[part], head.t(), out=logits)
        else:
            torch.addmm(bias, rows[part], head.t(), out=logits)
        yield part, logits


def _losses(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, lift: float
) -> Tensor:
    """The cross-entropies (n,) of logits (n, C), 0 where ignored; the logits become their gradient times `lift`."""
    dtype, (count, classes) = accumulation_dtype(logits.dtype), logits.shape
    size = count if logits.is_cuda else min(count, max(1, BLOCK_ELEMENTS // classes))
    scratch = logits.new_empty((size, classes), dtype=dtype)
    losses = logits.new_empty((count,), dtype=dtype)
    ignored = labels == ignore_index
    safe = labels.masked_fill(ignored, 0).unsqueeze(1)
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        p = torch.log_softmax(logits[here].to(dtype), 1, out=scratch[: here.stop - start])
        torch.mul(p.gather(1, safe[here]).squeeze(1), label_smoothing - 1, out=losses[here])
        if label_smoothing:
            losses[here].sub_(p.mean(1), alpha=label_smoothing)
        p.exp_()
        if label_smoothing:
            p.sub_(label_smoothing / classes)
        reward = p.new_full((1, 1), label_smoothing - 1.0).expand(safe[here].shape)
        p.scatter_add_(1, safe[here], reward)
        p.masked_fill_(ignored[here].unsqueeze(1), 0)  # whatever such rows hold
        logits[here] = p if lift == 1.0 else p.mul_(lift)
    return losses.masked_fill_(ignored, 0)


def eager_forward(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int,
    label_smoothing: float, chunks: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and the gradients that `wanted` asks for with the factor that makes them those of the loss.

    Gradients are those of hidden, head and bias; what is not wanted has no elements.
    """
    _check(hidden, head, bias, targets, label_smoothing, chunks)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    classes, width = head.shape
    dtype, lift = accumulation_dtype(hidden.dtype), LIFT.get(hidden.dtype, 1.0)
    losses = hidden.new_empty(labels.shape, dtype=dtype)
    drows = hidden.new_empty(rows.shape if wanted[0] else (0,))
    dhead = head.new_zeros((classes, width) if wanted[1] else (0,), dtype=dtype)
    dbias = head.new_zeros((classes,) if wanted[2] else (0,), dtype=dtype)
    for part, logits in _chunks(rows, head, bias, chunks):
        losses[part] = _losses(logits, labels[part], ignore_index, label_smoothing, lift)
        if wanted[0]:
            torch.mm(logits, head, out=drows[part])
        if wanted[1]:
            of_views.add_product(dhead, logits, rows[part])
        if wanted[2]:
            dbias.add_(logits.sum(0, dtype=dtype))
    kept = (labels != ignore_index).sum()
    factor = (kept.clamp(min=1).to(dtype) * lift).reciprocal()
    dhidden = drows.view(hidden.shape) if wanted[0] else drows
    return losses.sum() / kept, dhidden, dhead, dbias, factor


def fake_forward(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int,
    label_smoothing: float, chunks: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(hidden, head, bias, targets, label_smoothing, chunks)
    dtype = accumulation_dtype(hidden.dtype)
    loss, factor = (hidden.new_empty((), dtype=dtype) for _ in range(2))
    dhidden = hidden.new_empty(hidden.shape) if wanted[0] else absent(hidden)
    dhead = head.new_empty(head.shape if wanted[1] else (0,), dtype=dtype)
    dbias = head.new_empty(head.shape[:1] if wanted[2] else (0,), dtype=dtype)
    return loss, dhidden, dhead, dbias, factor


def eager_backward(
    dhidden: Tensor, dhead: Tensor, dbias: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times `factor`, in the dtype of hidden."""
    # A 0-d factor would be rounded to a 16-bit dtype before it multiplies.
    of_hidden, of_head, of_bias = (
        (one.to(factor.dtype) * factor).to(dhidden.dtype) for one in (dhidden, dhead, dbias)
    )
    return of_hidden, of_head, of_bias


def fake_backward(
    dhidden: Tensor, dhead: Tensor, dbias: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_head, of_bias = (
        one.new_empty(one.shape, dtype=dhidden.dtype) for one in (dhidden, dhead, dbias)
    )
    return of_hidden, of_head, of_bias


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[-1]


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    *gradients, factor = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if any(n and not w for n, w in zip(needed, ctx.wanted, strict=True)):
        raise RuntimeError(
            f"gradients of hidden, head and bias were to be made as {list(ctx.wanted)} when the loss was computed, "
            f"and {list(needed)} are asked for: let them require gradients before the call"
        )
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(needed):
        found = _backward_op(*gradients, dloss * factor)
        grads = tuple(g if n else None for g, n in zip(found, needed, strict=True))
    return *grads, None, None, None, None, None


# CUDA takes cuBLAS and, row by row, ATen.
_forward_op = register(
    "linear_cross_entropy",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register(
    "linear_cross_entropy_backward",
    cpu=eager_backward,
    cuda=eager_backward,
    fake=fake_backward,
)
