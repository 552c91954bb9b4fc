"""Triton kernel that zeroes what a mask leaves out; imported by the first CUDA call.

It reads and writes the tensor in full vectors: storing zeros alone would move fewer bytes, but by
one narrow store an entry.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.launch import launch
from trainc.kernels.parameter import masked_update as operator

BLOCK = 2048
# A weight and its two moments.
TOGETHER = 3


@triton.jit
def _zero(TENSOR, at, inside, kept):
    x = tl.load(TENSOR + at, mask=inside, other=0.0)
    tl.store(TENSOR + at, tl.where(kept != 0, x, tl.zeros_like(x)), mask=inside)


@triton.jit
def zero_outside(
    FIRST, SECOND, THIRD, MASK, count,
    TENSORS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of count,): in one to three tensors, by one reading of the mask."""
    if PACKED:
        byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        bit = tl.arange(0, 8)
        at = byte[:, None] * 8 + bit[None, :]
        inside = at < count
        bits = tl.load(MASK + byte, mask=byte * 8 < count, other=0).to(tl.int32)
        kept = (bits[:, None] >> bit[None, :]) & 1
    else:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        kept = tl.load(MASK + at, mask=inside, other=0).to(tl.int32)
    _zero(FIRST, at, inside, kept)
    if TENSORS > 1:
        _zero(SECOND, at, inside, kept)
    if TENSORS > 2:
        _zero(THIRD, at, inside, kept)


def masked_update_(tensors: Sequence[Tensor], mask: Tensor) -> None:
    """The CUDA kernel of trainc::masked_update_."""
    operator.check(tensors, mask)
    packed = mask.dtype == torch.uint8
    taken = [t.is_contiguous() and not t.is_complex() for t in tensors]
    dense = [t for t, one in zip(tensors, taken, strict=True) if one and t.numel()]
    operator.eager([t for t, one in zip(tensors, taken, strict=True) if not one], mask)
    bits = mask.contiguous() if packed else mask.contiguous().view(torch.uint8)
    for start in range(0, len(dense), TOGETHER):
        some = dense[start : start + TOGETHER]
        count = some[0].numel()
        launch(
            zero_outside, (triton.cdiv(count, BLOCK),),
            *some, *[some[0]] * (TOGETHER - len(some)), bits, count,
            TENSORS=len(some), PACKED=packed, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
