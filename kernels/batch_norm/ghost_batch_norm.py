"""Batch normalisation by statistics of ghost batches: slices of x, so nothing is transposed or copied."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.batch_norm import ghost_batches
from trainc.kernels.library.contracts import (
    REDUCED,
    absent,
    accumulation_dtype,
    composition_is_cheaper,
    lazy,
    require,
)
from trainc.kernels.library.register import register

__all__ = ["ghost_batch_norm"]

# Elements up to which torch's calls, ghost by ghost, cost less on a CPU than an operator around them.
SMALL = 1 << 18


def ghost_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ghost_size: int = 128,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    remainder: str = "error",
    running: str = "in_order",
) -> Tensor:
    """Normalize `x` by the statistics of ghost batches of n = `ghost_size` examples; in evaluation, by running ones.

    `x` is (B, C, ...), floating; `weight` and `bias` are (C,), or None for a factor of one and nothing added, and
    `running_mean` and `running_var` (C,), or both None; all in x's dtype, or in float32 beside 16-bit x. With
    `training`, examples [i n, (i + 1) n) are normalized by their own mean and biased variance (`eps` is added to it),
    exactly as one F.batch_norm call per ghost batch would, and the running statistics are updated in place to what
    those calls, in order, would leave (the variance unbiased), for S ghosts and a = `momentum`

      r <- (1 - a)^S r + sum_i a (1 - a)^(S-1-i) s_i

    With `running` "mean" they are updated once, by the mean of the ghosts' means and biased variances.

    `remainder` says what B % n != 0 does: "error"; "merge_last", where the last ghost also takes the examples left
    over; "smaller", where these are a ghost of their own; or "even", where all ghosts get fewer examples, as
    torch.chunk divides a batch into ceil(B / n) parts. Without `training` this is F.batch_norm by the running
    statistics, by the whole batch's where they are None.

    Returns a tensor of x's shape and dtype. Raises RuntimeError for other shapes, dtypes and rules and for a ghost
    batch of one value per channel; torch's own calls, in evaluation and below, also ValueError. In training, second
    derivatives raise RuntimeError and forward-mode ones NotImplementedError, except where F.batch_norm itself serves:
    up to 262144 elements on a CPU, uncompiled, all tensors float32 or all float64, and `running` "in_order".

    Source: Hoffer et al. 2017, arXiv:1705.08741.
    """
    # ATen's backward of (B, C) reads a strided weight as if it were dense.
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    if not training:
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, running_mean is None, 0.0, eps
        )
    _check_running(x, running, running_mean, running_var)
    if x.dim() >= 2:
        ghost_size, remainder = ghost_batches.resolve(x.shape[0], ghost_size, remainder)
    # In 16 bits torch would keep the statistics in 16 bits.
    plain = x.dtype not in REDUCED and running == "in_order"
    if plain and composition_is_cheaper(SMALL, x, running_mean, running_var, weight, bias):
        rules = ghost_size, momentum, eps, remainder
        return _ghost_by_ghost(x, running_mean, running_var, weight, bias, *rules)
    y, mean, _, var = _forward_op(x, weight, bias, ghost_size, eps, remainder)
    with torch.no_grad():
        if running == "mean" and len(mean):
            mean, var = _mean_statistics(x, ghost_size, mean, var)
        advance_(running_mean, running_var, mean, var, momentum)
    result: Tensor = y
    return result


def _ghost_by_ghost(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ghost_size: int,
    momentum: float,
    eps: float,
    remainder: str,
) -> Tensor:
    """The same by one call of torch's batch norm for each ghost batch."""
    ghost_batches.check(x, weight, bias, ghost_size, remainder)
    ghosts = ghost_batches.count(x, ghost_size, remainder)
    each = [
        functional.batch_norm(part, running_mean, running_var, weight, bias, True, momentum, eps)
        for (part,) in ghost_batches.parts(ghosts, ghost_size, x)
    ]
    return torch.cat(each) if len(each) > 1 else each[0] if each else x.clone()


def _check_running(x: Tensor, running: str, *statistics: Tensor | None) -> None:
    """Reject a rule that does not exist, and running statistics of another shape than (C,)."""
    require(
        running in ghost_batches.RUNNING,
        lambda: f"running must be one of {ghost_batches.RUNNING}, not {running!r}",
    )
    for kept in statistics:
        if kept is not None and kept.shape != x.shape[1:2]:
            raise RuntimeError(
                f"running statistics must have the shape {tuple(x.shape[1:2])}, not {tuple(kept.shape)}"
            )


def _mean_statistics(
    x: Tensor, ghost_size: int, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """The means over ghosts (1, C) of their means and biased variances, from unbiased ones (S, C)."""
    ghosts, each = mean.shape[0], math.prod(x.shape[2:])
    values = torch.full((ghosts, 1), ghost_size * each, dtype=var.dtype, device=var.device)
    values[-1] = (x.shape[0] - ghost_size * (ghosts - 1)) * each
    return mean.mean(0, keepdim=True), (var * (values - 1) / values).mean(0, keepdim=True)


def advance_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
) -> None:
    """Update running statistics (C,) exponentially by the rows of (S, C), in order.

    A sum over ghosts may cancel, so it is taken in float64: it has S C terms, next to nothing.
    """
    count = mean.shape[0]
    age = torch.arange(count - 1, -1, -1, device=mean.device, dtype=torch.float64)
    decay, kept = torch.pow(1.0 - momentum, age).mul_(momentum), (1.0 - momentum) ** count
    for running, statistics in ((running_mean, mean), (running_var, var)):
        if running is not None:
            moved = torch.mv(statistics.t().double(), decay)
            running.copy_(moved.add_(running, alpha=kept))


def reference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the running statistics by definition, one ghost batch of the given size at a time."""
    parts, shape = [], [1, x.shape[1], *([1] * (x.dim() - 2))]
    for ghost in x.split(sizes):
        dims = [0, *range(2, x.dim())]
        mean, count = ghost.mean(dims), ghost.numel() // ghost.shape[1]
        var = (ghost - mean.view(shape)).square().mean(dims)
        unit = (ghost - mean.view(shape)) * (var + eps).rsqrt().view(shape)
        unit = unit if weight is None else unit * weight.view(shape)
        parts.append(unit if bias is None else unit + bias.view(shape))
        running_mean = (1 - momentum) * running_mean + momentum * mean.detach()
        running_var = (1 - momentum) * running_var + momentum * var.detach() * count / (count - 1)
    return torch.cat(parts), running_mean, running_var


def _affine(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """A dense weight that makes ATen keep float32 statistics beside 16-bit x."""
    if x.dtype not in REDUCED:
        return weight if weight is None else weight.contiguous()
    return (
        x.new_ones(x.shape[1], dtype=torch.float32)
        if weight is None
        else weight.float().contiguous()
    )


def eager_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    ghost_size: int, eps: float, remainder: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and, per ghost batch, mean, 1 / sqrt(biased variance + eps) and unbiased variance."""
    ghost_batches.check(x, weight, bias, ghost_size, remainder)
    x = ghost_batches.laid_out(x)
    y = torch.empty_like(x)
    shape = (ghost_batches.count(x, ghost_size, remainder), x.shape[1])
    # Results may not share memory.
    mean, rstd, var = (x.new_zeros(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    weight = _affine(x, weight)
    bias = bias.float() if bias is not None and x.dtype in REDUCED else bias
    unused = torch.zeros_like(mean[0]) if shape[0] else None
    statistics = zip(mean.unbind(), rstd.unbind(), var.unbind(), strict=True)
    for (here, to), (own_mean, own_rstd, own_var) in zip(
        ghost_batches.parts(shape[0], ghost_size, x, y), statistics, strict=True
    ):
        # With momentum 1 ATen's running statistics are this batch's, the variance unbiased.
        torch.native_batch_norm(
            here, weight, bias, unused, own_var, True, 1.0, eps, out=(to, own_mean, own_rstd)
        )
    return y, mean, rstd, var


def fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    ghost_size: int, eps: float, remainder: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ghost_batches.check(x, weight, bias, ghost_size, remainder)
    shape = (ghost_batches.count(x, ghost_size, remainder), x.shape[1])
    mean, rstd, var = (x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    return torch.empty_like(ghost_batches.laid_out(x)), mean, rstd, var


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    ghost_size: int, eps: float, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, and dweight and dbias in the statistics' dtype; unwanted results have no elements."""
    x = ghost_batches.laid_out(x)
    if not rstd.numel():
        gain, shift = (rstd.new_zeros(x.shape[1] if wanted else 0) for wanted in mask[1:])
        return torch.empty_like(x) if mask[0] else absent(x), gain, shift
    weight = _affine(x, weight)
    dx = torch.empty_like(x) if mask[0] else absent(x)
    gains, shifts = [], []
    for (here, along, to), own_mean, own_rstd in zip(
        ghost_batches.parts(len(rstd), ghost_size, x, dy.contiguous(), dx if mask[0] else x),
        mean.unbind(), rstd.unbind(), strict=True,
    ):  # fmt: skip
        part, gain, shift = torch.ops.aten.native_batch_norm_backward(
            along, here, weight, None, None, own_mean, own_rstd, True, eps, mask
        )
        if mask[0]:
            to.copy_(part)  # while it is in cache
        gains.append(gain)
        shifts.append(shift)
    dweight, dbias = (
        torch.stack(parts).sum(0) if wanted else absent(rstd)
        for parts, wanted in zip((gains, shifts), mask[1:], strict=True)
    )
    return dx, dweight, dbias


def fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    ghost_size: int, eps: float, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(ghost_batches.laid_out(x)) if mask[0] else absent(x)
    dweight, dbias = (rstd.new_empty(x.shape[1]) if wanted else absent(rstd) for wanted in mask[1:])
    return dx, dweight, dbias


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ghost_size, eps, _ = inputs
    _, mean, rstd, var = output
    ctx.mark_non_differentiable(mean, rstd, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.options, ctx.bias_dtype = (ghost_size, eps), None if bias is None else bias.dtype


def _backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 6
    x, weight, mean, rstd = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    dx, dweight, dbias = _backward_op(dy, x, weight, mean, rstd, *ctx.options, mask)
    return (
        dx if mask[0] else None,
        dweight.to(weight.dtype) if mask[1] else None,
        dbias.to(ctx.bias_dtype) if mask[2] else None,
        *(None,) * 3,
    )


# No autocast rule: mixed precision is in the contract, and torch leaves batch_norm alone as well.
_forward_op = register(
    "ghost_batch_norm",
    cpu=eager_forward,
    cuda=lazy("batch_norm.triton_ghost_batch_norm", "ghost_batch_norm"),
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register(
    "ghost_batch_norm_backward",
    cpu=eager_backward,
    cuda=lazy("batch_norm.triton_ghost_batch_norm", "ghost_batch_norm_backward"),
    fake=fake_backward,
)
