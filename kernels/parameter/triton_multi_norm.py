"""Triton kernels for the sums of many tensors in one launch; imported by the first CUDA call.

A table of addresses on the device names the tensors (`triton_tables`); a program takes one chunk of one tensor and
leaves four float64 partial sums, which a second kernel adds tensor by tensor, so results are
deterministic. Tensors of one pair of dtypes share a launch. Addresses read from a table carry no
alignment, so aligned tensors get kernels that say so, and full blocks go without a mask: loads
under a mask of unknown length stay scalar.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.launch import launch
from trainc.kernels.parameter import multi_norm as operator
from trainc.kernels.parameter.triton_tables import Numbers, aligned, owner_of, pieces

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


class _Group(NamedTuple):
    """Tensors of one pair of dtypes: their places, their table and how many chunks it lists; without one, ATen's."""

    places: list[int]
    dtypes: tuple[torch.dtype, torch.dtype]
    aligned: bool = False
    table: Numbers | None = None
    chunks: int = 0


def _listed(
    tensors: Sequence[int], others: Sequence[int], sizes: Sequence[int], rows: Sequence[int],
    chunk: int,
) -> list[int]:  # fmt: skip
    """Addresses of the tensors and of the others, sizes, rows of the result, and the chunk each tensor begins with."""
    ends = accumulate((pieces(size, chunk) for size in sizes), initial=0)
    return [*tensors, *others, *sizes, *rows, *ends]


def groups(
    tensors: tuple[int, ...], others: tuple[int, ...], sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...], other_dtypes: tuple[torch.dtype, ...], chunk: int,
) -> tuple[_Group, ...]:  # fmt: skip
    """What is launched for contiguous tensors at these addresses, with as many entries and of these dtypes.

    It follows from nothing but these numbers. So it may be kept: another tensor that has come to an address, in the
    place of one that was moved, resized or freed, is there with its own size and dtype, or is read just as the first.
    """
    operator.check_real((*dtypes, *other_dtypes))
    members: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for place, pair in enumerate(zip(dtypes, other_dtypes or dtypes, strict=True)):
        members.setdefault(pair, []).append(place)
    found = []
    for pair, places in members.items():
        if not all(dtype in TYPES for dtype in pair):
            found.append(_Group(places, pair))
            continue
        left = [tensors[place] for place in places]
        right = [others[place] for place in places] if others else left
        numbers = _listed(left, right, [sizes[place] for place in places], places, chunk)
        wide = aligned((*left, *right))
        found.append(_Group(places, pair, wide, Numbers(numbers), numbers[-1]))
    return tuple(found)


# The least recently used goes first. Entries are few, for one holds a few numbers a tensor; lists of few tensors, which
# may be many (a parameter at a time) and cost little, would only push out those that are worth keeping.
_kept_groups = lru_cache(maxsize=16)(groups)
FEW = 8


def _sums(group: _Group, table: Numbers, paired: bool, out: Tensor) -> None:
    """Fill a group's rows of `out`."""
    listed, tensors = table.on(out.device), len(group.places)
    partial = torch.empty((group.chunks, operator.COLUMNS), dtype=torch.float64, device=out.device)
    if group.chunks:
        left, right = group.dtypes
        launch(
            partial_sums, (group.chunks,),
            listed, partial, tensors,
            W=TYPES[left], D=TYPES[right], PAIRED=paired,
            ALIGNED=group.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    launch(add_partials, (tensors,), partial, listed, out, tensors, BLOCK=64, num_warps=4)


def _described(
    tensors: Sequence[Tensor],
) -> tuple[list[Tensor], tuple[int, ...], tuple[torch.dtype, ...]]:
    """The tensors, contiguous, with their addresses and dtypes."""
    dense = [one.contiguous() for one in tensors]
    return dense, tuple([one.data_ptr() for one in dense]), tuple([one.dtype for one in dense])


def multi_norm(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """The CUDA kernel of trainc::multi_norm."""
    operator.check_shapes(tensors, deltas)
    left, addresses, dtypes = _described(tensors)
    right, others, other_dtypes = _described(deltas)
    sizes = tuple([one.numel() for one in left])
    found = _kept_groups if len(left) > FEW else groups
    size, device = (len(left), operator.COLUMNS), left[0].device
    result = torch.empty(size, dtype=torch.float64, device=device)
    for group in found(addresses, others, sizes, dtypes, other_dtypes, CHUNK):
        if group.table is not None:
            _sums(group, group.table, bool(deltas), result)
            continue
        mine, other = ([one[i] for i in group.places] if one else [] for one in (left, right))
        for place, sums in zip(group.places, operator.eager(mine, other), strict=True):
            result[place].copy_(sums)
    return result
