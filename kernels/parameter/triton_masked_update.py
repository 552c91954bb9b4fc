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


@triton.jit
def zero_outside(TENSOR, MASK, count, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of count,)."""
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
    x = tl.load(TENSOR + at, mask=inside, other=0.0)
    tl.store(TENSOR + at, tl.where(kept != 0, x, tl.zeros_like(x)), mask=inside)


def masked_update_(tensors: Sequence[Tensor], mask: Tensor) -> None:
    """The CUDA kernel of trainc::masked_update_."""
    operator.check(tensors, mask)
    packed = mask.dtype == torch.uint8
    dense = [t for t in tensors if t.is_contiguous() and t.numel()]
    operator.eager([t for t in tensors if not t.is_contiguous()], mask)
    bits = mask.contiguous() if packed else mask.contiguous().view(torch.uint8)
    for tensor in dense:
        launch(
            zero_outside, (triton.cdiv(tensor.numel(), BLOCK),),
            tensor, bits, tensor.numel(), PACKED=packed, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
