"""Launch the Triton norm kernels: shapes, regimes, and the cases left to ATen."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from trainc.kernels.library.contracts import (
    REDUCED,
    Folded,
    absent,
    check_norm,
    fold,
    statistic_shape,
)
from trainc.kernels.library.grid import resident_programs
from trainc.kernels.norm import layer_norm, rms_norm, tiles, tuned_tiles
from trainc.kernels.norm import triton_norm as kernels
from trainc.kernels.norm import triton_wide_norm as wide
from trainc.kernels.norm.tiles import Tile

# Sums over chunks are read by many small programs: one per 32 columns, 64 chunks at a time.
FINISH_COLUMNS = 32
FINISH_CHUNKS = 64


def supported(x: Tensor) -> bool:
    """Whether the kernels take x, or ATen does: float64 and empty inputs."""
    return x.dtype in (torch.float32, *REDUCED) and x.numel() > 0


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    rms: bool,
    llama: bool = False,
    offset: bool = False,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x, or of x + residual which fills total; RMSNorm leaves mean unwritten."""
    x = x.contiguous()
    width = math.prod(normalized_shape)
    rows = x.numel() // width
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = x.new_empty(statistic_shape(x, normalized_shape), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    pointers = (
        x, contiguous(residual, x), x if total is None else total,
        contiguous(weight, x), contiguous(bias, x), y, mean, rstd,
    )  # fmt: skip
    flags = {"ADD": residual is not None, "RMS": rms, "LLAMA": llama, "OFFSET": offset}
    flags |= {"HAS_W": weight is not None, "HAS_B": bias is not None}
    if width > tiles.MAX_WIDTH and tile is None:
        wide.forward(pointers, width, eps, flags)
        return y, mean, rstd
    shape = tile or tuned_tiles.choose("forward", rms, x.dtype, rows, width, x.device)
    kernels.norm_forward[(triton.cdiv(rows, shape.rows),)](
        *pointers, rows, width, eps, BLOCK_R=shape.rows, BLOCK_C=shape.columns,
        num_warps=shape.warps, **flags,
    )  # fmt: skip
    return y, mean, rstd


def roundings(casting: str) -> dict[str, Any]:
    """A casting of RMSNorm as the options of forward and backward."""
    return {"llama": casting == "llama", "offset": casting == rms_norm.OFFSET}


def contiguous(parameter: Tensor | None, stand_in: Tensor) -> Tensor:
    """The parameter, or for an absent one any pointer: the kernel does not read it."""
    return stand_in if parameter is None else parameter.contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    write_dx: bool,
    rms: bool,
    llama: bool = False,
    offset: bool = False,
    programs: int | None = None,
    dtotal: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (+ dtotal), float32 gradients of weight and bias (width,), norms (examples, columns)."""
    x, dy = x.contiguous(), dy.contiguous()
    folded = fold(x, normalized_shape)
    examples, rows, width = folded.shape
    columns = 1 if rms else 2
    flags: dict[str, Any] = {
        "ADD": dtotal is not None,
        "RMS": rms,
        "LLAMA": llama,
        "OFFSET": offset,
        "HAS_W": weight is not None,
        "HAS_B": has_bias,
        "WRITE_DX": write_dx,
    }
    dx = torch.empty_like(x) if write_dx else absent(x)
    inputs = (x, contiguous(weight, x), dy, contiguous(dtotal, dy), dx, mean, rstd)
    if width > tiles.HELD and tile is None:
        partials, chunks = wide.backward(inputs, folded, columns, flags, programs)
        return dx, *finish(partials, folded, chunks, flags)
    lines = examples if rows == 1 else rows
    shape = tile or tuned_tiles.choose("backward", rms, x.dtype, lines, width, x.device)
    slots = resident_programs(x.device, shape.resident) if programs is None else programs
    # Two more sums of the widest rows would not fit the registers.
    few = tiles.FEW_ROWS if shape.columns < tiles.HELD else 0
    config = tiles.launch_config(examples, rows, shape.rows, slots, few)
    flags |= {"COLUMNS": columns, "STAGES": shape.stages}
    flags |= {"BLOCK_R": shape.rows, "BLOCK_C": shape.columns, "num_warps": shape.warps}
    partials = x.new_empty((columns, config.programs, width), dtype=torch.float32)
    sums = (partials[0], partials[-1])
    if config.regime == "split":
        # Without ROW_NORMS nothing is stored through NORMS.
        kernels.norm_backward_split[(config.programs,)](
            *inputs, *sums, rstd, rows, width, config.chunks, triton.cdiv(rows, config.chunks),
            ROW_NORMS=False, **flags,
        )  # fmt: skip
        return dx, *finish(partials, folded, config.chunks, flags)
    norms = x.new_zeros((examples, columns), dtype=torch.float32)
    if config.regime == "rows":
        kernels.norm_backward_split[(config.programs,)](
            *inputs, *sums, norms, examples, width, config.programs,
            triton.cdiv(examples, config.programs), ROW_NORMS=True, **flags,
        )  # fmt: skip
    else:
        kernels.norm_backward_whole[(config.programs,)](
            *inputs, *sums, norms, examples, rows, width, config.programs, **flags
        )
    totals = partials.sum(1)
    return dx, totals[0], totals[-1], norms


def finish(
    partials: Tensor, folded: Folded, chunks: int, flags: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias gradients (width,) and norms (examples, columns) of partial rows.

    `partials` is (columns, examples * chunks, width) in float32.
    """
    columns, examples, width = partials.shape[0], folded.examples, folded.width
    blocks = triton.cdiv(width, FINISH_COLUMNS)
    kinds = [kind for kind, present in enumerate((flags["HAS_W"], flags["HAS_B"])) if present]
    each = partials.new_empty((columns, examples, width))
    squares = partials.new_zeros((examples, columns, blocks))
    if kinds:
        kernels.norm_finish[(examples, blocks, len(kinds))](
            partials, each, squares, examples, chunks, width, kinds[0], COLUMNS=columns,
            BLOCK_S=min(FINISH_CHUNKS, triton.next_power_of_2(chunks)), BLOCK_C=FINISH_COLUMNS,
        )  # fmt: skip
    totals = each[:, 0] if examples == 1 else each.sum(1)
    return totals[0], totals[-1], squares.sum(2)


def finished(total: Tensor, parameter: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """A gradient in its parameter's dtype and shape, or the stand-in for one not wanted."""
    if parameter is None or not wanted:
        return absent(x)
    return total.to(parameter.dtype).view(parameter.shape)


def layer_norm_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::layer_norm; without a probe it is ATen's, as its backward is."""
    check_norm(x, normalized_shape, weight, bias, probe, layer_norm.COLUMNS)
    if probe is None or not supported(x):
        return layer_norm.eager_forward(x, normalized_shape, weight, bias, probe, eps)
    return forward(x, normalized_shape, weight, bias, eps, x.dtype, rms=False)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::layer_norm_backward."""
    if not supported(x):
        return layer_norm.eager_backward(
            dy, x, normalized_shape, mean, rstd, weight, bias, output_mask
        )
    dx, dweight, dbias, norms = backward(
        dy, x, normalized_shape, mean, rstd, weight, bias is not None, output_mask[0],
        rms=False,
    )  # fmt: skip
    return (
        dx,
        finished(dweight, weight, output_mask[1], x),
        finished(dbias, bias, output_mask[2], x),
        norms,
    )


def rms_norm_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    """The CUDA kernel of trainc::rms_norm."""
    rms_norm.check(x, normalized_shape, weight, probe, casting)
    if not supported(x):
        return rms_norm.eager_forward(x, normalized_shape, weight, probe, eps, casting)
    dtype = rms_norm.result_dtype(x, weight, casting)
    y, _, rstd = forward(
        x, normalized_shape, weight, None, eps, dtype, rms=True, **roundings(casting)
    )
    return y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    casting: str,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::rms_norm_backward."""
    if not supported(x):
        return rms_norm.eager_backward(
            dy, x, normalized_shape, rstd, weight, casting, output_mask, with_norms
        )
    dx, dweight, _, norms = backward(
        dy, x, normalized_shape, rstd, rstd, weight, False, output_mask[0],
        rms=True, **roundings(casting),
    )  # fmt: skip
    kept = norms if with_norms else absent(rstd)
    return dx, finished(dweight, weight, output_mask[1], x), kept
