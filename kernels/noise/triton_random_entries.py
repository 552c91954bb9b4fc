"""Triton kernel for random entries of parameters, with its launcher; imported by the first CUDA call."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.library.grid import supported
from trainc.kernels.library.launch import launch
from trainc.kernels.noise import random_entries as operators
from trainc.kernels.noise.triton_noise import SIDE, _normals

BLOCK_GROUPS = 256


@triton.jit(do_not_specialize=["site"])
def entries(
    Y, KEY, site, columns, NORMAL: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """Grid (rows, blocks of columns)."""
    unit: tl.constexpr = 5.9604644775390625e-08
    row, block = tl.program_id(0), tl.program_id(1)
    group = block * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    column = block * BLOCK_G * 4 + tl.arange(0, BLOCK_G * 4)[None, :]
    key, zero = tl.load(KEY), group * 0
    if NORMAL:
        drawn = _normals(key, group, zero + row, zero, zero + site)
    else:
        w0, w1, w2, w3 = tl.philox(key, group, zero + row, zero, zero + site)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        drawn = (words >> 8).to(tl.float32) * unit
    at = row.to(tl.int64) * columns + column
    tl.store(Y + at, drawn.to(Y.dtype.element_ty), mask=column < columns)


def random_entries(like: Tensor, key: Tensor, site: int, distribution: str) -> Tensor:
    """The CUDA kernel of trainc::random_entries."""
    if not supported(like):
        return operators.eager(like, key, site, distribution)
    operators.check(like, key, site, distribution)
    y = torch.empty(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device)
    rows, columns = operators.matrix_shape(like)
    groups = min(BLOCK_GROUPS, triton.next_power_of_2(triton.cdiv(columns, 4)))
    groups = max(groups, triton.next_power_of_2(triton.cdiv(columns, 4 * SIDE)))
    launch(
        entries, (rows, triton.cdiv(columns, 4 * groups)),
        y, key.to(y.device), site - (site >> 31 << 32), columns,
        NORMAL=distribution == "normal", BLOCK_G=groups,
    )  # fmt: skip
    return y
