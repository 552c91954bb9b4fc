"""Launch the Triton norm kernels: shapes, regimes, and the cases left to ATen; imported by the first CUDA call."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from trainc.kernels.library.contracts import absent
from trainc.kernels.library.grid import resident_programs, supported
from trainc.kernels.library.launch import launch
from trainc.kernels.norm import tiles, tuned_tiles
from trainc.kernels.norm import triton_norm as kernels
from trainc.kernels.norm import triton_wide_norm as wide_rows
from trainc.kernels.norm.norm_operator import NormOperator, backward_arguments, empty_total
from trainc.kernels.norm.rows import Folded, fold, statistic_shape
from trainc.kernels.norm.tiles import Tile

# Sums over chunks are read by many small programs: one per 32 columns, 64 chunks at a time.
FINISH_COLUMNS = 32
FINISH_CHUNKS = 64


def operator_forward(operator: NormOperator, *arguments: Any) -> tuple[Tensor, ...]:
    """The CUDA kernel of a norm; where ATen's backward serves, without a probe, so does its forward."""
    norm, count = operator.norm, len(operator.norm.parameters)
    x, residual, normalized_shape, *rest = (
        arguments if operator.residual else (arguments[0], None, *arguments[1:])
    )
    total = x if residual is None else empty_total(x, residual)
    norm.check(total, normalized_shape, *rest)
    if not supported(total) or (operator.native and rest[count] is None):
        return operator.eager_forward(*arguments)  # type: ignore[no-any-return]
    weight, bias = (*rest[:count], None)[:2]
    eps, casting = (*rest[count + 1 :], "none")[:2]
    y, mean, rstd = forward(
        x, normalized_shape, weight, bias, eps, norm.dtypes(total, *rest)[0],
        "mean" not in norm.statistics, casting, residual, total,
    )  # fmt: skip
    return *([] if residual is None else [total]), y, *(mean, rstd)[-count:]


def operator_backward(operator: NormOperator, *arguments: Any) -> tuple[Tensor, ...]:
    """The CUDA kernel of a norm's backward."""
    dtotal, dy, x, normalized_shape, *rest = arguments if operator.residual else (None, *arguments)
    if not supported(x):
        return operator.eager_backward(*arguments)  # type: ignore[no-any-return]
    statistics, parameters, options, mask, with_norms = backward_arguments(operator.norm, rest)
    weight, bias = (*parameters, None)[:2]
    dx, dweight, dbias, norms = backward(
        dy, x, normalized_shape, statistics[0], statistics[-1], weight, bias is not None, mask[0],
        "mean" not in operator.norm.statistics, (*options, "none")[0], dtotal=dtotal,
    )  # fmt: skip
    totals = zip((dweight, dbias), parameters, mask[1:], strict=False)
    gradients = (finished(total, parameter, wanted, x) for total, parameter, wanted in totals)
    return dx, *gradients, norms if with_norms else absent(statistics[-1])


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    rms: bool,
    casting: str = "none",
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
        x, contiguous(residual, x), x if residual is None or total is None else total,
        contiguous(weight, x), contiguous(bias, x), y, mean, rstd,
    )  # fmt: skip
    flags = _flags(residual is not None, rms, casting, weight is not None, bias is not None)
    if width > tiles.MAX_WIDTH and tile is None:
        wide_rows.forward(pointers, width, eps, flags)
        return y, mean, rstd
    shape = tile or tuned_tiles.choose("forward", rms, x.dtype, rows, width, x.device)
    launch(
        kernels.norm_forward, (triton.cdiv(rows, shape.rows),),
        *pointers, rows, width, eps, BLOCK_R=shape.rows, BLOCK_C=shape.columns,
        num_warps=shape.warps, **flags,
    )  # fmt: skip
    return y, mean, rstd


def _flags(add: bool, rms: bool, casting: str, has_weight: bool, has_bias: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "ADD": add, "RMS": rms, "LLAMA": casting == "llama", "OFFSET": casting == "gemma",
        "HAS_W": has_weight, "HAS_B": has_bias,
    }  # fmt: skip


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
    casting: str = "none",
    programs: int | None = None,
    dtotal: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (+ dtotal), float32 gradients of weight and bias (width,), norms (examples, columns)."""
    x, dy = x.contiguous(), dy.contiguous()
    folded = fold(x, normalized_shape)
    columns = 1 if rms else 2
    flags = _flags(dtotal is not None, rms, casting, weight is not None, has_bias)
    flags["WRITE_DX"] = write_dx
    dx = torch.empty_like(x) if write_dx else absent(x)
    inputs = (x, contiguous(weight, x), dy, contiguous(dtotal, dy), dx, mean, rstd)
    if folded.width > tiles.HELD and tile is None:
        partials, chunks = wide_rows.backward(inputs, folded, columns, flags, programs)
        return dx, *finish(partials, folded, chunks, flags)
    lines = folded.examples if folded.rows == 1 else folded.rows
    tile = tile or tuned_tiles.choose("backward", rms, x.dtype, lines, folded.width, x.device)
    return dx, *_sums(inputs, folded, columns, flags, tile, programs)


def _sums(
    inputs: tuple[Tensor, ...],
    folded: Folded,
    columns: int,
    flags: dict[str, Any],
    tile: Tile,
    programs: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx; return gradients of weight and bias (width,) and norms, by the regime that costs least."""
    x, rstd = inputs[0], inputs[-1]
    examples, rows, width = folded.shape
    slots = resident_programs(x.device, tile.resident) if programs is None else programs
    # Two more sums of the widest rows would not fit the registers.
    few = tiles.FEW_ROWS if tile.columns < tiles.HELD else 0
    config = tiles.launch_config(examples, rows, tile.rows, slots, few)
    options = flags | {
        "COLUMNS": columns, "STAGES": tile.stages, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns,
        "num_warps": tile.warps,
    }  # fmt: skip
    partials = x.new_empty((columns, config.programs, width), dtype=torch.float32)
    pointers = (*inputs, partials[0], partials[-1])
    if config.regime == "split":
        # Without ROW_NORMS nothing is stored through NORMS.
        launch(
            kernels.norm_backward_split, (config.programs,),
            *pointers, rstd, rows, width, config.chunks, triton.cdiv(rows, config.chunks),
            ROW_NORMS=False, **options,
        )  # fmt: skip
        return finish(partials, folded, config.chunks, flags)
    norms = x.new_zeros((examples, columns), dtype=torch.float32)
    if config.regime == "rows":
        launch(
            kernels.norm_backward_split, (config.programs,),
            *pointers, norms, examples, width, config.programs,
            triton.cdiv(examples, config.programs), ROW_NORMS=True, **options,
        )  # fmt: skip
    else:
        launch(
            kernels.norm_backward_whole, (config.programs,),
            *pointers, norms, examples, rows, width, config.programs, **options,
        )  # fmt: skip
    totals = partials.sum(1)
    return totals[0], totals[-1], norms


def finish(
    partials: Tensor, folded: Folded, chunks: int, flags: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias gradients (width,) and norms (examples, columns) of partial rows.

    `partials` is (columns, examples * chunks, width) in float32.
    """
    columns, examples, width = partials.shape[0], folded.examples, folded.width
    blocks = triton.cdiv(width, FINISH_COLUMNS)
    present = [column for column, has in enumerate((flags["HAS_W"], flags["HAS_B"])) if has]
    each = partials.new_empty((columns, examples, width))
    squares = partials.new_zeros((examples, columns, blocks))
    if present:
        launch(
            kernels.norm_finish, (examples * blocks, len(present)),
            partials, each, squares, examples, chunks, width, present[0], COLUMNS=columns,
            BLOCK_S=min(FINISH_CHUNKS, triton.next_power_of_2(chunks)), BLOCK_C=FINISH_COLUMNS,
        )  # fmt: skip
    totals = each[:, 0] if examples == 1 else each.sum(1)
    return totals[0], totals[-1], squares.sum(2)


def finished(total: Tensor, parameter: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """A gradient in its parameter's dtype and shape, or an empty tensor if it is not requested."""
    if parameter is None or not wanted:
        return absent(x)
    return total.to(parameter.dtype).view(parameter.shape)
