"""Triton kernels for the sums of many tensors in one launch; imported by the first CUDA call.

A table of addresses on the device names the tensors (`triton_tables`); a program takes one chunk of one tensor and
leaves four float64 partial sums, which a second kernel adds tensor by tensor, so results are
deterministic. Tensors of one pair of dtypes share a launch. Addresses read from a table carry no
alignment, so aligned tensors get kernels that say so, and full blocks go without a mask: loads
under a mask of unknown length stay scalar.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED
from trainc.kernels.library.launch import launch
from trainc.kernels.parameter import multi_norm as operator
from trainc.kernels.parameter.triton_tables import aligned, owner_of, table

BLOCK = 2048
CHUNK = 1 << 15
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _add(w, d, sums, broken, PAIRED: tl.constexpr):
    """The three sums and the count of non-finite entries after one more block."""
    ww, dd, wd = sums
    ww += w * w
    broken += 1 - (tl.abs(w) < float("inf")).to(tl.int32)
    if PAIRED:
        dd += d * d
        wd += w * d
        broken += 1 - (tl.abs(d) < float("inf")).to(tl.int32)
    return (ww, dd, wd), broken


@triton.jit(do_not_specialize=["tensors"])
def partial_sums(
    TABLE, OUT, tensors,
    W: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks,): OUT (chunks, 4). TABLE is `_listed`'s."""
    pid = tl.program_id(0)
    ENDS = TABLE + 4 * tensors
    tensor = owner_of(ENDS, pid, tensors)
    start = (pid - tl.load(ENDS + tensor)) * CHUNK
    size = tl.load(TABLE + 2 * tensors + tensor)
    left = tl.load(TABLE + tensor).to(tl.pointer_type(W))
    right = tl.load(TABLE + tensors + tensor).to(tl.pointer_type(D))
    if ALIGNED:
        left = tl.multiple_of(left, 16)
        right = tl.multiple_of(right, 16)
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero, zero, zero)
    broken = tl.zeros((BLOCK,), tl.int32)
    end = tl.minimum(start + CHUNK, size)
    full = (end - start) // BLOCK * BLOCK
    d = zero
    for offset in range(0, full, BLOCK):
        at = start + offset + lane
        w = tl.load(left + at).to(tl.float32)
        if PAIRED:
            d = tl.load(right + at).to(tl.float32)
        sums, broken = _add(w, d, sums, broken, PAIRED)
    if start + full < end:
        at = start + full + lane
        w = tl.load(left + at, mask=at < end, other=0.0).to(tl.float32)
        if PAIRED:
            d = tl.load(right + at, mask=at < end, other=0.0).to(tl.float32)
        sums, broken = _add(w, d, sums, broken, PAIRED)
    ww, dd, wd = sums
    out = OUT + pid * 4
    # A lane holds few terms, whose float32 sum is good; across lanes it would add their errors.
    tl.store(out, tl.sum(ww.to(tl.float64), 0))
    tl.store(out + 1, tl.sum(dd.to(tl.float64), 0))
    tl.store(out + 2, tl.sum(wd.to(tl.float64), 0))
    tl.store(out + 3, tl.sum(broken, 0).to(tl.float64))


@triton.jit(do_not_specialize=["tensors"])
def add_partials(PARTIAL, TABLE, OUT, tensors, BLOCK: tl.constexpr):
    """Grid (tensors,): the sum of each tensor's rows of PARTIAL in its row of OUT."""
    pid = tl.program_id(0)
    first = tl.load(TABLE + 4 * tensors + pid)
    last = tl.load(TABLE + 4 * tensors + pid + 1)
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    total = tl.zeros((BLOCK, 4), tl.float64)
    for start in range(first, last, BLOCK):
        mask = (start + row < last) & (column < 4)
        total += tl.load(PARTIAL + (start + row) * 4 + column, mask=mask, other=0.0)
    out = OUT + tl.load(TABLE + 3 * tensors + pid) * 4
    tl.store(out + tl.arange(0, 4), tl.sum(total, 0))


def _listed(tensors: Sequence[Tensor], others: Sequence[Tensor], rows: Sequence[int]) -> list[int]:
    """Addresses of the tensors and of the others, sizes, rows of the result, and the chunk each tensor begins with."""
    sizes = [one.numel() for one in tensors]
    ends = accumulate((triton.cdiv(size, CHUNK) for size in sizes), initial=0)
    addresses = [one.data_ptr() for one in (*tensors, *others)]
    return [*addresses, *sizes, *rows, *ends]


def _sums(
    tensors: Sequence[Tensor], deltas: Sequence[Tensor], rows: Sequence[int], out: Tensor
) -> None:
    """Fill rows of `out` for contiguous tensors of one pair of dtypes, all aligned or treated as if not."""
    paired, others = bool(deltas), deltas or tensors
    numbers = _listed(tensors, others, rows)
    listed, chunks = table(numbers, out.device), numbers[-1]
    partial = torch.empty((chunks, operator.COLUMNS), dtype=torch.float64, device=out.device)
    if chunks:
        launch(
            partial_sums, (chunks,),
            listed, partial, len(tensors),
            W=TYPES[tensors[0].dtype], D=TYPES[others[0].dtype], PAIRED=paired,
            ALIGNED=aligned((*tensors, *others)), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    launch(add_partials, (len(tensors),), partial, listed, out, len(tensors), BLOCK=64, num_warps=4)


def multi_norm(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """The CUDA kernel of trainc::multi_norm."""
    operator.check(tensors, deltas)
    result = torch.empty(
        (len(tensors), operator.COLUMNS), dtype=torch.float64, device=tensors[0].device
    )
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        key = (tensor.dtype, deltas[index].dtype) if deltas else (tensor.dtype,)
        groups.setdefault(key, []).append(index)
    for dtypes, members in groups.items():
        left = [tensors[i].contiguous() for i in members]
        right = [deltas[i].contiguous() for i in members] if deltas else []
        if all(dtype in (torch.float32, *REDUCED) for dtype in dtypes):
            _sums(left, right, members, result)
            continue
        for member, sums in zip(members, operator.eager(left, right), strict=True):
            result[member].copy_(sums)
    return result
