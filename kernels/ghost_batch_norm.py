"""Batch normalisation with statistics over ghost batches of n examples (Hoffer et al. 2017).

Contract. `x` is (B, C, ...), floating; `weight` and `bias` are (C,) or None. In training, examples
[i n, (i + 1) n) are normalised by their own mean and biased variance, exactly as one F.batch_norm
call per ghost batch would, and the running statistics (C,) end as those calls, in order, would leave
them (variance with its n / (n - 1)): r <- (1 - m)^S r + sum_i m (1 - m)^(S-1-i) s_i for S ghosts. In
evaluation the running statistics normalise and the ghost size means nothing. `remainder` says what
B % n != 0 does: "error", or "merge_last", where the last ghost also takes the examples left over.

Ghost batches are slices of x, so nothing is transposed or copied (arXiv 1705.08741).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.support import REDUCED, absent, accumulation_dtype, require

REMAINDERS = ("error", "merge_last")


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
) -> Tensor:
    """x normalised, (B, C, ...); in training the running statistics are updated in place."""
    if not training:
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, running_mean is None, 0.0, eps
        )
    y, mean, _, var = torch.ops.trainc.ghost_batch_norm(x, weight, bias, ghost_size, eps, remainder)
    with torch.no_grad():
        for running, statistics in ((running_mean, mean), (running_var, var)):
            if running is not None:
                running.copy_(advance(running, statistics, momentum))
    result: Tensor = y
    return result


def advance(running: Tensor, statistics: Tensor, momentum: float) -> Tensor:
    """Running statistics (C,) after exponential updates by the rows of (S, C), in order."""
    ghosts = statistics.shape[0]
    age = torch.arange(ghosts - 1, -1, -1, device=statistics.device, dtype=statistics.dtype)
    decay = torch.pow(1.0 - momentum, age).mul_(momentum)
    return running * (1.0 - momentum) ** ghosts + torch.mv(statistics.t(), decay)


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


def ghosts(x: Tensor, ghost_size: int) -> int:
    """How many ghost batches x has: a batch smaller than one is one, an empty batch none."""
    examples = x.shape[0]
    return examples // ghost_size if examples >= ghost_size else min(examples, 1)


def _slices(x: Tensor, ghost_size: int) -> list[slice]:
    """The examples of each ghost batch; the last takes the remainder."""
    count = ghosts(x, ghost_size)
    ends = [*((i + 1) * ghost_size for i in range(count - 1)), x.shape[0]]
    return [slice(i * ghost_size, ends[i]) for i in range(count)]


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, ghost_size: int, remainder: str
) -> None:
    require(remainder in REMAINDERS, lambda: f"remainder is one of {REMAINDERS}, not {remainder!r}")
    require(x.dim() >= 2, lambda: f"expected a (B, C, ..) tensor, not {tuple(x.shape)}")
    require(
        all(p is None or tuple(p.shape) == tuple(x.shape[1:2]) for p in (weight, bias)),
        lambda: f"weight and bias must have the shape {tuple(x.shape[1:2])}",
    )
    require(ghost_size > 0, lambda: f"ghost_size is positive, not {ghost_size}")
    if remainder == "error":
        require(
            x.shape[0] % ghost_size == 0,
            lambda: (
                f"{x.shape[0]} examples do not divide into ghost batches of {ghost_size}; "
                f"remainder = merge_last lets the last one take the rest"
            ),
        )
    least = min(ghost_size, x.shape[0]) * math.prod(x.shape[2:])
    require(
        x.shape[0] == 0 or least > 1,
        lambda: f"a ghost batch of {least} value per channel has no variance",
    )


def _laid_out(x: Tensor) -> Tensor:
    """x, or a dense copy: channels-last stays as it is, every other layout becomes contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def _affine(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """A weight that makes ATen keep float32 statistics beside 16-bit x."""
    if x.dtype not in REDUCED:
        return weight
    return x.new_ones(x.shape[1], dtype=torch.float32) if weight is None else weight.float()


@torch.library.custom_op("trainc::ghost_batch_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    ghost_size: int, eps: float, remainder: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and, per ghost batch, mean, 1 / sqrt(biased variance + eps) and unbiased variance."""
    _check(x, weight, bias, ghost_size, remainder)
    x = _laid_out(x)
    y = torch.empty_like(x)
    shape = (ghosts(x, ghost_size), x.shape[1])
    mean, rstd, var = (x.new_zeros(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    weight = _affine(x, weight)
    bias = bias.float() if bias is not None and x.dtype in REDUCED else bias
    for ghost, here in enumerate(_slices(x, ghost_size)):
        # With momentum 1 ATen's running statistics are this batch's, the variance unbiased.
        torch.native_batch_norm(
            x[here], weight, bias, mean[ghost], var[ghost], True, 1.0, eps,
            out=(y[here], torch.empty_like(mean[ghost]), rstd[ghost]),
        )  # fmt: skip
    return y, mean, rstd, var


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    ghost_size: int, eps: float, remainder: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, weight, bias, ghost_size, remainder)
    shape = (ghosts(x, ghost_size), x.shape[1])
    mean, rstd, var = (x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    return torch.empty_like(_laid_out(x)), mean, rstd, var


@torch.library.custom_op("trainc::ghost_batch_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    ghost_size: int, eps: float, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, and dweight and dbias in the statistics' dtype; unwanted results have no elements."""
    x = _laid_out(x)
    dx = torch.empty_like(x) if mask[0] else absent(x)
    dweight, dbias = (rstd.new_zeros(x.shape[1]) if wanted else absent(rstd) for wanted in mask[1:])
    weight = _affine(x, weight)
    for ghost, here in enumerate(_slices(x, ghost_size)):
        one, gain, shift = torch.ops.aten.native_batch_norm_backward(
            dy[here].contiguous(), x[here], weight, None, None, mean[ghost], rstd[ghost],
            True, eps, mask,
        )  # fmt: skip
        for total, part in ((dx[here] if mask[0] else None, one), (dweight, gain), (dbias, shift)):
            if total is not None and part is not None and part.numel():
                total.copy_(part) if part is one else total.add_(part)
    return dx, dweight, dbias


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    ghost_size: int, eps: float, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(_laid_out(x)) if mask[0] else absent(x)
    dweight, dbias = (rstd.new_empty(x.shape[1]) if wanted else absent(rstd) for wanted in mask[1:])
    return dx, dweight, dbias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ghost_size, eps, _ = inputs
    _, mean, rstd, var = output
    ctx.mark_non_differentiable(mean, rstd, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.options, ctx.bias_dtype = (ghost_size, eps), None if bias is None else bias.dtype


def _differentiate(ctx, dy, *_):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 6
    x, weight, mean, rstd = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    dx, dweight, dbias = torch.ops.trainc.ghost_batch_norm_backward(
        dy, x, weight, mean, rstd, *ctx.options, mask
    )
    return (
        dx if mask[0] else None,
        dweight.to(weight.dtype) if mask[1] else None,
        dbias.to(ctx.bias_dtype) if mask[2] else None,
        *(None,) * 3,
    )


# No autocast rule: mixed precision is in the contract, and torch leaves batch_norm alone as well.
_forward.register_autograd(_differentiate, setup_context=_save)
