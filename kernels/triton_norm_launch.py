"""Launch the Triton norm kernels: shapes, regimes, and the cases left to ATen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from trainc.kernels import layer_norm, rms_norm
from trainc.kernels import triton_norm as kernels
from trainc.kernels.support import REDUCED, absent, check_norm, fold, statistic_shape

# A row must fit one program's registers; wider rows, float64 and empty inputs go through ATen.
MAX_WIDTH = 16384
FINISH_COLUMNS = 128
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class Tile:
    """Rows and columns a program holds at once, and its warps."""

    rows: int
    columns: int
    warps: int


def tile(rows: int, width: int) -> Tile:
    """About 4096 elements a program, one row where rows are wider."""
    columns = triton.next_power_of_2(width)
    most = max(1, min(16, 4096 // columns))
    warps = 4 if columns <= 2048 else 8 if columns <= 8192 else 16
    return Tile(min(most, triton.next_power_of_2(max(rows, 1))), columns, warps)


def supported(x: Tensor, width: int) -> bool:
    """Whether the kernels take x, or ATen does."""
    return x.dtype in (torch.float32, *REDUCED) and x.numel() > 0 and width <= MAX_WIDTH


def wanted_programs(x: Tensor) -> int:
    """How many programs fill the device."""
    if not x.is_cuda:
        return PROGRAMS_PER_PROCESSOR
    properties = torch.cuda.get_device_properties(x.device)
    return PROGRAMS_PER_PROCESSOR * int(properties.multi_processor_count)


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    rms: bool,
    llama: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd); mean is left unwritten for RMSNorm."""
    x = x.contiguous()
    width = math.prod(normalized_shape)
    rows = x.numel() // width
    shape = tile(rows, width)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = x.new_empty(statistic_shape(x, normalized_shape), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    kernels.norm_forward[(triton.cdiv(rows, shape.rows),)](
        x, contiguous(weight, x), contiguous(bias, x), y, mean, rstd, rows, width, eps,
        RMS=rms, LLAMA=llama, HAS_W=weight is not None, HAS_B=bias is not None,
        BLOCK_R=shape.rows, BLOCK_C=shape.columns, num_warps=shape.warps,
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
    weight: Tensor | None,
    has_bias: bool,
    write_dx: bool,
    rms: bool,
    llama: bool,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, float32 weight and bias gradients (width,), and norms (examples, columns)."""
    x, dy = x.contiguous(), dy.contiguous()
    folded = fold(x if x.dim() > len(normalized_shape) else x.unsqueeze(0), normalized_shape)
    examples, rows, width = folded.shape
    shape = tile(rows, width)
    programs = wanted_programs(x) if programs is None else programs
    columns = 1 if rms else 2
    flags: dict[str, Any] = {
        "RMS": rms,
        "LLAMA": llama,
        "HAS_W": weight is not None,
        "HAS_B": has_bias,
    }
    flags |= {"WRITE_DX": write_dx, "BLOCK_R": shape.rows, "BLOCK_C": shape.columns}
    dx = torch.empty_like(x) if write_dx else absent(x)
    inputs = (x, contiguous(weight, x), dy, dx, mean, rstd)

    def floats(*extents: int) -> Tensor:
        return torch.empty(extents, dtype=torch.float32, device=x.device)

    if examples >= programs:
        partials = [floats(programs, width) for _ in range(2)]
        norms = torch.zeros((examples, columns), dtype=torch.float32, device=x.device)
        kernels.norm_backward_whole[(programs,)](
            *inputs, *partials, norms, examples, rows, width, programs,
            COLUMNS=columns, num_warps=shape.warps, **flags,
        )  # fmt: skip
        return dx, partials[0].sum(0), partials[1].sum(0), norms

    chunks = min(triton.cdiv(rows, shape.rows), max(1, programs // examples))
    chunk_rows = triton.cdiv(rows, chunks)
    chunks = triton.cdiv(rows, chunk_rows)
    partials = [floats(examples, chunks, width) for _ in range(2)]
    kernels.norm_backward_split[(examples * chunks,)](
        *inputs, *partials, rows, width, chunks, chunk_rows, num_warps=shape.warps, **flags
    )
    totals, squares = [], []
    for partial, present in zip(partials, (weight is not None, has_bias), strict=True):
        blocks = triton.cdiv(width, FINISH_COLUMNS)
        total, square = floats(width), floats(blocks, examples)
        if present:
            kernels.norm_finish[(blocks,)](
                partial, total, square, examples, chunks, width,
                BLOCK_S=min(8, triton.next_power_of_2(chunks)), BLOCK_C=FINISH_COLUMNS,
            )  # fmt: skip
        else:
            square.zero_()
        totals.append(total)
        squares.append(square.sum(0))
    return dx, totals[0], totals[1], torch.stack(squares[:columns], 1)


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
    if probe is None or not supported(x, math.prod(normalized_shape)):
        return layer_norm.eager_forward(x, normalized_shape, weight, bias, probe, eps)
    return forward(x, normalized_shape, weight, bias, eps, x.dtype, rms=False, llama=False)


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
    if not supported(x, math.prod(normalized_shape)):
        return layer_norm.eager_backward(
            dy, x, normalized_shape, mean, rstd, weight, bias, output_mask
        )
    dx, dweight, dbias, norms = backward(
        dy, x, normalized_shape, mean, rstd, weight, bias is not None, output_mask[0],
        rms=False, llama=False,
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
    if not supported(x, math.prod(normalized_shape)):
        return rms_norm.eager_forward(x, normalized_shape, weight, probe, eps, casting)
    dtype, llama = rms_norm.result_dtype(x, weight, casting), casting == "llama"
    y, _, rstd = forward(x, normalized_shape, weight, None, eps, dtype, rms=True, llama=llama)
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
    if not supported(x, math.prod(normalized_shape)):
        return rms_norm.eager_backward(
            dy, x, normalized_shape, rstd, weight, casting, output_mask, with_norms
        )
    dx, dweight, _, norms = backward(
        dy, x, normalized_shape, rstd, rstd, weight, False, output_mask[0],
        rms=True, llama=casting == "llama",
    )  # fmt: skip
    kept = norms if with_norms else absent(rstd)
    return dx, finished(dweight, weight, output_mask[1], x), kept
