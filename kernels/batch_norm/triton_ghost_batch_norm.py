"""Triton kernels for ghost batch norm; imported by the first CUDA call.

x is (B, C, W), contiguous, and its statistics are those of n examples and one channel: n segments
of W neighbours, C W apart, read where they lie. Channels-last x is (B H W, C, 1). A program takes one
ghost batch and a block of channels (one where W is large) as tiles (samples, channels, positions).
Where one tile covers the ghost batch, x is read once and stays in registers. Where not, a first
walk merges each tile's mean and squared deviations into the totals (Chan, Golub, LeVeque 1983), so
that a mean far from zero costs no digits; a second walk, from cache where a ghost fits one, writes.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.batch_norm import ghost_batch_norm as operators
from trainc.kernels.batch_norm import ghost_batches
from trainc.kernels.library.contracts import absent
from trainc.kernels.library.grid import supported
from trainc.kernels.library.launch import launch

# Elements of a ghost batch and its channels that a program holds in registers: forward keeps x,
# backward x and dy. Larger ones are walked by tiles of WALKED, twice.
FORWARD_HELD, BACKWARD_HELD = 1 << 14, 1 << 13
WALKED = 1 << 12
# More samples beside RUN channels take twice the registers in addresses, and spill in backward.
WALKED_SAMPLES = 64
# Registers a thread of backward, for 2048 elements in rows of these lengths, where the assembler for sm_100 spills.
# A processor holds at most one program less. Longer and shorter rows spill nothing.
LIMITED, BACKWARD_REGISTERS = (256, 512), 96
# Neighbours in memory a program should find in one sample: 32 bytes and more.
RUN = 16


@triton.jit
def _tile(first, last, position, channel, channels, width):
    """Offsets (samples, channels, positions) from the ghost's tiles, and which of them exist."""
    sample = first[:, None, None]
    at = (sample.to(tl.int64) * channels + channel[None, :, None]) * width
    mask = (sample < last) & (channel < channels)[None, :, None]
    return at + position[None, None, :], mask & (position < width)[None, None, :]


@triton.jit
def _per_channel(values):
    """Sums over samples and positions, (channels,)."""
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def _bounds(ghost, ghosts, examples, ghost_size):
    """The ghost's first example and the end; the last ghost takes what is left over."""
    first = ghost * ghost_size
    return first, tl.where(ghost == ghosts - 1, examples, first + ghost_size)


@triton.jit
def ghost_forward(
    X, W, B, Y, MEAN, RSTD, VAR, examples, channels, width, ghosts, ghost_size, eps,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * ghosts,): y, and the ghost's mean, 1 / deviation, unbiased variance."""
    blocks = tl.cdiv(channels, BLOCK_C)
    ghost = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, last = _bounds(ghost, ghosts, examples, ghost_size)
    lane, place = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    count = (last - begin).to(tl.float32) * width
    if ONCE:
        at, mask = _tile(begin + lane, last, place, channel, channels, width)
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        mean = _per_channel(x) / count
        gap = tl.where(mask, x - mean[None, :, None], 0.0)
        squares = _per_channel(gap * gap)
    else:
        mean = tl.zeros((BLOCK_C,), tl.float32)
        squares = tl.zeros((BLOCK_C,), tl.float32)
        seen = tl.full((), 0.0, tl.float32)
        for start in range(begin, last, BLOCK_N):
            for offset in range(0, width, BLOCK_S):
                at, mask = _tile(start + lane, last, offset + place, channel, channels, width)
                x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
                rows, columns = (
                    tl.minimum(last - start, BLOCK_N),
                    tl.minimum(width - offset, BLOCK_S),
                )
                more = rows.to(tl.float32) * columns
                part = _per_channel(x) / more
                gap = tl.where(mask, x - part[None, :, None], 0.0)
                apart = part - mean
                share = more / (seen + more)
                squares += _per_channel(gap * gap) + apart * apart * seen * share
                mean += apart * share
                seen += more
    rstd = tl.rsqrt(squares / count + eps)
    known = channel < channels
    to = ghost.to(tl.int64) * channels + channel
    tl.store(MEAN + to, mean, mask=known)
    tl.store(RSTD + to, rstd, mask=known)
    tl.store(VAR + to, squares / (count - 1.0), mask=known)
    scale, shift = rstd, tl.zeros((BLOCK_C,), tl.float32)
    if HAS_W:
        scale *= tl.load(W + channel, mask=known, other=0.0).to(tl.float32)
    if HAS_B:
        shift = tl.load(B + channel, mask=known, other=0.0).to(tl.float32)
    if ONCE:
        y = (x - mean[None, :, None]) * scale[None, :, None] + shift[None, :, None]
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)
    else:
        for start in range(begin, last, BLOCK_N):
            for offset in range(0, width, BLOCK_S):
                at, mask = _tile(start + lane, last, offset + place, channel, channels, width)
                x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
                y = (x - mean[None, :, None]) * scale[None, :, None] + shift[None, :, None]
                tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def ghost_backward(
    DY, X, W, MEAN, RSTD, DX, GAIN, SHIFT, examples, channels, width, ghosts, ghost_size,
    HAS_W: tl.constexpr, WRITE_DX: tl.constexpr, ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * ghosts,): dx, and the ghost's part of dweight and dbias, (ghosts, C)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    ghost = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, last = _bounds(ghost, ghosts, examples, ghost_size)
    lane, place = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    count = (last - begin).to(tl.float32) * width
    known = channel < channels
    to = ghost.to(tl.int64) * channels + channel
    mean = tl.load(MEAN + to, mask=known, other=0.0)
    rstd = tl.load(RSTD + to, mask=known, other=0.0)
    if ONCE:
        at, mask = _tile(begin + lane, last, place, channel, channels, width)
        unit = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        unit = (unit - mean[None, :, None]) * rstd[None, :, None]
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        gain, shift = _per_channel(dy * unit), _per_channel(dy)
    else:
        gain = tl.zeros((BLOCK_C,), tl.float32)
        shift = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(begin, last, BLOCK_N):
            for offset in range(0, width, BLOCK_S):
                at, mask = _tile(start + lane, last, offset + place, channel, channels, width)
                unit = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
                unit = (unit - mean[None, :, None]) * rstd[None, :, None]
                dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
                gain += _per_channel(dy * unit)
                shift += _per_channel(dy)
    tl.store(GAIN + to, gain, mask=known)
    tl.store(SHIFT + to, shift, mask=known)
    if WRITE_DX:
        scale = rstd
        if HAS_W:
            scale *= tl.load(W + channel, mask=known, other=0.0).to(tl.float32)
        along, level = gain / count, shift / count
        if ONCE:
            dx = dy - level[None, :, None] - unit * along[None, :, None]
            tl.store(DX + at, (dx * scale[None, :, None]).to(DX.dtype.element_ty), mask=mask)
        else:
            for start in range(begin, last, BLOCK_N):
                for offset in range(0, width, BLOCK_S):
                    at, mask = _tile(start + lane, last, offset + place, channel, channels, width)
                    unit = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
                    unit = (unit - mean[None, :, None]) * rstd[None, :, None]
                    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
                    dx = dy - level[None, :, None] - unit * along[None, :, None]
                    tl.store(
                        DX + at, (dx * scale[None, :, None]).to(DX.dtype.element_ty), mask=mask
                    )


@dataclass(frozen=True, slots=True)
class Tile:
    """Samples, channels and positions a program holds, whether that is all of them, and warps."""

    samples: int
    channels: int
    positions: int
    once: bool
    warps: int


def tile(size: int, channels: int, width: int, held: int) -> Tile:
    """The tile for ghost batches of at most `size` samples."""
    positions = triton.next_power_of_2(width)
    block = min(triton.next_power_of_2(channels), max(1, RUN // positions))
    samples = triton.next_power_of_2(size)
    once = samples * block * positions <= held
    if not once:
        positions = min(positions, WALKED)
        samples = min(samples, WALKED_SAMPLES, max(1, WALKED // (positions * block)))
    elements = samples * block * positions
    warps = 4 if elements <= 2048 else 8 if elements <= 8192 else 16
    return Tile(samples, block, positions, once, warps)


def _sizes(x: Tensor, count: int, ghost_size: int) -> tuple[int, int, int, int, int]:
    """Examples, channels, width, ghosts and the ghost size of dense x in memory order."""
    examples, channels, *rest = x.shape
    width, size = math.prod(rest), min(ghost_size, examples)
    if x.is_contiguous():
        return examples, channels, width, count, size
    return examples * width, channels, 1, count, size * width


def limits(chosen: Tile) -> dict[str, int]:
    """The launch options of backward for a tile besides its own."""
    elements = chosen.samples * chosen.channels * chosen.positions
    limited = chosen.once and elements == 2048 and chosen.positions in LIMITED
    return {"maxnreg": BACKWARD_REGISTERS} if limited else {}


def _launch(kernel, pointers, sizes, held, *scalars, **flags) -> None:
    """Run a kernel over channel blocks and ghosts."""
    examples, channels, width, count, size = sizes
    chosen = tile(max(size, examples - (count - 1) * size), channels, width, held)
    more = limits(chosen) if kernel is ghost_backward else {}
    launch(
        kernel, (triton.cdiv(channels, chosen.channels) * count,),
        *pointers, examples, channels, width, count, size, *scalars,
        **flags, ONCE=chosen.once, BLOCK_N=chosen.samples, BLOCK_C=chosen.channels,
        BLOCK_S=chosen.positions, num_warps=chosen.warps, **more,
    )  # fmt: skip


def ghost_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    ghost_size: int, eps: float, remainder: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The CUDA kernel of trainc::ghost_batch_norm."""
    affine = [p for p in (weight, bias) if p is not None]
    if not supported(x, *affine):
        return operators.eager_forward(x, weight, bias, ghost_size, eps, remainder)
    ghost_batches.check(x, weight, bias, ghost_size, remainder)
    x = ghost_batches.laid_out(x)
    sizes = _sizes(x, ghost_batches.count(x, ghost_size, remainder), ghost_size)
    y = torch.empty_like(x)
    shape = (sizes[3], x.shape[1])
    mean, rstd, var = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
    given = [x if p is None else p.contiguous() for p in (weight, bias)]
    _launch(
        ghost_forward, (x, *given, y, mean, rstd, var), sizes, FORWARD_HELD, eps,
        HAS_W=weight is not None, HAS_B=bias is not None,
    )  # fmt: skip
    return y, mean, rstd, var


def ghost_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    ghost_size: int, eps: float, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The CUDA kernel of trainc::ghost_batch_norm_backward."""
    if not supported(x, dy, *([] if weight is None else [weight])):
        return operators.eager_backward(dy, x, weight, mean, rstd, ghost_size, eps, mask)
    x = ghost_batches.laid_out(x)
    last = not x.is_contiguous()
    dy = dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    dx = torch.empty_like(x) if mask[0] else absent(x)
    # Every ghost leaves its part, and one sum adds them in order: no atomics.
    parts = rstd.new_empty((2, *rstd.shape))
    _launch(
        ghost_backward,
        (dy, x, x if weight is None else weight.contiguous(), mean, rstd, dx, *parts),
        _sizes(x, len(rstd), ghost_size), BACKWARD_HELD, HAS_W=weight is not None, WRITE_DX=mask[0],
    )  # fmt: skip
    gain, shift = (
        part.sum(0) if wanted else absent(rstd)
        for part, wanted in zip(parts, mask[1:], strict=True)
    )
    return dx, gain, shift
