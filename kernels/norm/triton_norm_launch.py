"""Launch the Triton norm kernels: shapes, regimes, and the cases left to ATen; imported by the first CUDA call."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.contracts import absent
from trainc.kernels.library.grid import cdiv, resident_programs, supported
from trainc.kernels.library.launch import launch
from trainc.kernels.library.occupancy import Fit, fitted
from trainc.kernels.norm import tiles, tuned_tiles
from trainc.kernels.norm import triton_norm as kernels
from trainc.kernels.norm import triton_wide_norm as wide_rows
from trainc.kernels.norm.norm_operator import NormOperator, backward_arguments, empty_total
from trainc.kernels.norm.partial_sums import Sums
from trainc.kernels.norm.rows import Folded, fold, statistic_shape
from trainc.kernels.norm.tiles import Tile


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


def operator_backward(
    operator: NormOperator, *arguments: Any, more: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """The CUDA kernel of a norm's backward; `more` are gradients of y beside the first."""
    dtotal, dy, x, normalized_shape, *rest = arguments if operator.residual else (None, *arguments)
    if not supported(x):
        first, *others = arguments[operator.residual :]
        given = (*arguments[: operator.residual], sum(more, first), *others)
        return operator.eager_backward(*given)  # type: ignore[no-any-return]
    statistics, parameters, options, mask, with_norms = backward_arguments(operator.norm, rest)
    count = len(parameters)
    dx, *gradients, norms = backward(
        dy, x, normalized_shape, statistics[0], statistics[-1], (*parameters, None)[:2],
        (*mask, False)[:3], "mean" not in operator.norm.statistics, (*options, "none")[0],
        with_norms=with_norms, dtotal=dtotal, more=more,
    )  # fmt: skip
    return dx, *gradients[:count], norms


def operator_backward_of_sum(operator: NormOperator, *arguments: Any) -> tuple[Tensor, ...]:
    """The CUDA kernel of a norm's backward for several gradients of y."""
    dtotal, dy, second, third, *rest = arguments if operator.residual else (None, *arguments)
    more = [one for one in (second, third) if one is not None]
    if not all(one.dtype == dy.dtype for one in more):
        dy, more = sum(more, dy), []
    given = (dtotal, dy, *rest) if operator.residual else (dy, *rest)
    return operator_backward(operator, *given, more=more)


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
    flags = {
        "ADD": residual is not None, "RMS": rms, "LLAMA": casting == "llama", "OFFSET": casting == "gemma",
        "HAS_W": weight is not None, "HAS_B": bias is not None,
    }  # fmt: skip
    if width > tiles.MAX_WIDTH and tile is None:
        wide_rows.forward(pointers, width, eps, flags)
        return y, mean, rstd
    shape = tile or tuned_tiles.choose("forward", rms, x.dtype, rows, width, x.device)
    launch(
        kernels.norm_forward, (cdiv(rows, shape.rows),),
        *pointers, rows, width, eps, BLOCK_R=shape.rows, BLOCK_C=shape.columns,
        num_warps=shape.warps, **flags,
    )  # fmt: skip
    return y, mean, rstd


def contiguous(parameter: Tensor | None, stand_in: Tensor) -> Tensor:
    """The parameter, or for an absent one any pointer: the kernel does not read it."""
    return stand_in if parameter is None else parameter.contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    parameters: Sequence[Tensor | None],
    mask: Sequence[bool],
    rms: bool,
    casting: str = "none",
    with_norms: bool = True,
    programs: int | None = None,
    dtotal: Tensor | None = None,
    tile: Tile | None = None,
    more: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (+ dtotal), gradients of weight and bias, norms (examples, columns); what is not asked for is empty.

    `more` are up to two gradients to be added to dy, in its dtype.
    """
    wide = math.prod(normalized_shape) > tiles.HELD and tile is None
    if wide:
        dy, more = sum(more, dy), ()
    x, dy, terms = x.contiguous(), dy.contiguous(), 1 + len(more)
    second, third = (*(one.contiguous() for one in more), dy, dy)[:2]
    sums = Sums(parameters, mask[1:], 1 if rms else 2, with_norms, x)
    folded = fold(x, normalized_shape)
    norms = x.new_empty(
        (folded.examples, sums.columns) if with_norms else (0,), dtype=torch.float32
    )
    if not sums.squared:  # any rows may share a program
        folded = Folded(1, folded.examples * folded.rows, folded.width)
    dx = torch.empty_like(x) if mask[0] else absent(x)
    weight = parameters[0]
    read = (x, contiguous(weight, x), dy)
    rest = (contiguous(dtotal, dy), dx, mean, rstd)
    flags: dict[str, int] = {
        "ADD": dtotal is not None, "RMS": rms, "LLAMA": casting == "llama",
        "OFFSET": casting == "gemma", "HAS_W": weight is not None, "WRITE_DX": mask[0],
    }  # fmt: skip
    if wide:
        wide_rows.backward((*read, *rest), folded, sums, norms, flags, programs)
    else:
        lines = folded.examples if folded.rows == 1 else folded.rows
        tile = tile or tuned_tiles.choose("backward", rms, x.dtype, lines, folded.width, x.device)
        inputs, flags = (*read, second, third, *rest), flags | {"TERMS": terms}
        _held(inputs, folded, sums, norms, flags, tile, programs)
    return dx, sums.gradients[0], sums.gradients[1], norms


def _slots(
    kernel: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    tile: Tile,
    programs: int | None,
) -> tuple[int, Fit]:
    """Programs of a kernel that run at once on the arguments' device, with what they are launched with."""
    if programs is not None:
        return programs, Fit()
    device = arguments[0].device
    found = Fit(tile.resident) if tile.resident else fitted(kernel, arguments, options)
    return resident_programs(device, found.programs), found


def _held(
    inputs: tuple[Tensor, ...],
    folded: Folded,
    sums: Sums,
    norms: Tensor,
    flags: dict[str, Any],
    tile: Tile,
    programs: int | None,
) -> None:
    """Write everything, by the regime that costs least."""
    x = inputs[0]
    examples, rows, width = folded.shape
    options = flags | sums.flags | {
        "COLUMNS": sums.columns, "STAGES": tile.stages, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns,
        "num_warps": tile.warps,
    }  # fmt: skip
    by_rows: dict[str, int] = {"ROW_NORMS": sums.squared and rows == 1}

    # Norms stand in for the scratch memory, which is float32 as well.
    shared = (*inputs, norms, norms)
    split, fit = _slots(
        kernels.norm_backward_split, (*shared, 16, width, 16, 16), options | by_rows, tile, programs
    )
    # Fewer of its programs fit a processor, so each has a tile more under way.
    stages: dict[str, int] = {"STAGES": tile.stages + 1} if tile.stages > 1 else {}
    whole, whole_fit = 0, Fit()
    # Two more sums of the widest rows would not fit the registers.
    if sums.squared and 1 < rows < tiles.FEW_ROWS and tile.columns < tiles.HELD:
        whole, whole_fit = _slots(
            kernels.norm_backward_whole, (*shared, 16, 16, width), options | stages, tile, programs
        )
    config = tiles.launch_config(examples, rows, tile.rows, split, whole)
    squared = sums.squared and config.regime == "split"
    lines = (examples, config.chunks) if squared else (1, config.programs)
    blocks, step = sums.step(*lines, width, squared, x.device) if sums.count else (0, {})
    scratch = sums.scratch(config.programs, examples * blocks if squared else 0, width, x)
    pointers, grid = (*inputs, scratch, norms), (config.programs,)
    if config.regime == "whole":
        launch(
            kernels.norm_backward_whole, grid, *pointers, examples, rows, width,
            **(options | stages), **whole_fit.options,
        )  # fmt: skip
    else:
        # One row an example: one example in name.
        length, chunks = (examples, config.programs) if rows == 1 else (rows, config.chunks)
        launch(
            kernels.norm_backward_split, grid, *pointers, length, width, chunks, cdiv(length, chunks),
            **options, **by_rows, **fit.options,
        )  # fmt: skip
    if not sums.count:
        if norms.numel():
            norms.zero_()
    else:
        launch(
            kernels.norm_finish, (blocks, sums.count),
            scratch, *sums.gradients, norms, *lines, width, **step,
        )  # fmt: skip
