"""Triton kernel for per-example norms of an embedding's gradient; imported by the first CUDA call.

Ids are sorted within their examples, in an order that equal ids keep, and a program adds the rows
of one run of equal ids in that order and squares the sum. Runs are each stored at their first id's
place and added up in a fixed order: results are deterministic.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.layer import embedding as operator
from trainc.kernels.library.grid import supported
from trainc.kernels.library.launch import launch

# Most runs are of one row, which a warp reads straight. The rows of longer ones come a few at a time.
ROWS = 4
COLUMNS = 512


@triton.jit(do_not_specialize=["rows", "padding"])
def run_squares(
    DY, SORTED, ORDER, SQUARES, rows, width, padding,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (B * T, blocks): SQUARES (B * T, blocks), zero where no run of counted ids begins."""
    pid, block = tl.program_id(0), tl.program_id(1)
    start = pid % rows
    first = pid.to(tl.int64) - start  # the example's first row
    own = tl.load(SORTED + pid)
    before = tl.load(SORTED + pid - 1, mask=start > 0, other=-1)
    after = tl.load(SORTED + pid + 1, mask=start + 1 < rows, other=-1)
    row = first + tl.load(ORDER + pid)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    begins = (own != before) & (own != padding)
    in_column = column < tl.where(begins, width, 0)
    found = tl.load(DY + row * width + column, mask=in_column, other=0.0).to(tl.float32)
    # Equal ids are neighbours: the run ends in the first step that is not full of them.
    goes_on = begins & (after == own)
    while goes_on:
        place = start + 1 + tl.arange(0, BLOCK_R)
        same = tl.load(SORTED + first + place, mask=place < rows, other=-1) == own
        further = first + tl.load(ORDER + first + place, mask=same, other=0)
        found += tl.sum(
            tl.load(
                DY + further[:, None] * width + column[None, :],
                mask=same[:, None] & in_column[None, :], other=0.0,
            ).to(tl.float32),
            0,
        )  # fmt: skip
        start += BLOCK_R
        goes_on = tl.sum(same.to(tl.int32), 0) == BLOCK_R
    tl.store(SQUARES + pid.to(tl.int64) * tl.num_programs(1) + block, tl.sum(found * found, 0))


def norms(dy: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    """The (B, 1) squared norms."""
    if not supported(dy):
        return operator.eager_norms(dy, ids, padding_idx)
    examples, width = ids.shape[0], dy.shape[-1]
    rows = ids.numel() // examples
    keys, order = ids.reshape(examples, rows).sort(dim=1, stable=True)
    block = min(COLUMNS, triton.next_power_of_2(width))
    squares = torch.empty(
        (examples * rows, triton.cdiv(width, block)), dtype=torch.float32, device=dy.device
    )
    launch(
        run_squares, squares.shape,
        dy.contiguous(), keys.contiguous(), order.contiguous(), squares, rows, width, padding_idx,
        BLOCK_R=ROWS, BLOCK_C=block, num_warps=1,
    )  # fmt: skip
    return squares.view(examples, -1).sum(1, keepdim=True)


def embedding_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The CUDA kernel of trainc::embedding_backward."""
    return operator.backward(norms, *arguments)
