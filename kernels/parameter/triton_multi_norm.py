"""Triton kernels for the sums of many tensors in one launch; imported by the first CUDA call.

A table of addresses on the device names the tensors; a program takes one chunk of one tensor and
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

BLOCK = 2048
CHUNK = 1 << 15
ALIGNMENT = 16
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


@triton.jit
def partial_sums(
    LEFT, RIGHT, SIZES, TENSORS, STARTS, OUT,
    W: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks,): OUT (chunks, 4) from tensor TENSORS[pid], entries from STARTS[pid] on."""
    pid = tl.program_id(0)
    tensor = tl.load(TENSORS + pid)
    start = tl.load(STARTS + pid)
    size = tl.load(SIZES + tensor)
    left = tl.load(LEFT + tensor).to(tl.pointer_type(W))
    right = tl.load(RIGHT + tensor).to(tl.pointer_type(D))
    if ALIGNED:
        left = tl.multiple_of(left, 16)
        right = tl.multiple_of(right, 16)
        start = tl.multiple_of(start, 16)
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


@triton.jit
def add_partials(PARTIAL, ENDS, OUT, BLOCK: tl.constexpr):
    """Grid (tensors,): OUT (tensors, 4), row i the sum of PARTIAL rows ENDS[i - 1] to ENDS[i]."""
    pid = tl.program_id(0)
    first = tl.load(ENDS + pid)
    last = tl.load(ENDS + pid + 1)
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    total = tl.zeros((BLOCK, 4), tl.float64)
    for start in range(first, last, BLOCK):
        mask = (start + row < last) & (column < 4)
        total += tl.load(PARTIAL + (start + row) * 4 + column, mask=mask, other=0.0)
    tl.store(OUT + pid * 4 + tl.arange(0, 4), tl.sum(total, 0))


def _sums(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """(n, 4) for contiguous tensors of one pair of dtypes, all aligned or treated as if not."""
    device, paired = tensors[0].device, bool(deltas)
    others = deltas if paired else tensors
    aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in (*tensors, *others))
    starts = [range(0, t.numel(), CHUNK) for t in tensors]
    ends = [0, *accumulate(map(len, starts))]
    names = [index for index, every in enumerate(starts) for _ in every]
    # One copy to the device carries every table.
    lists = [[t.data_ptr() for t in tensors], [t.data_ptr() for t in others]]
    lists += [[t.numel() for t in tensors], names, [s for every in starts for s in every], ends]
    tables = torch.tensor([n for part in lists for n in part], dtype=torch.int64, device=device)
    left, right, sizes, owners, first, last = tables.split([len(part) for part in lists])
    partial = torch.empty((ends[-1], operator.COLUMNS), dtype=torch.float64, device=device)
    out = torch.empty((len(tensors), operator.COLUMNS), dtype=torch.float64, device=device)
    if ends[-1]:
        launch(
            partial_sums, (ends[-1],),
            left, right, sizes, owners, first, partial,
            W=TYPES[tensors[0].dtype], D=TYPES[others[0].dtype], PAIRED=paired, ALIGNED=aligned,
            CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    launch(add_partials, (len(tensors),), partial, last, out, BLOCK=64, num_warps=4)
    return out


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
        narrow = all(dtype in (torch.float32, *REDUCED) for dtype in dtypes)
        found = _sums(left, right) if narrow else operator.eager(left, right)
        result[torch.tensor(members, device=result.device)] = found
    return result
