"""Triton kernels for the sums of many tensors in one launch; imported by the first CUDA call.

A table of addresses on the device names the tensors (`triton_tables`); a program takes one chunk of one tensor and
leaves four float64 partial sums. The program that is counted last of its tensor adds them, in one order whoever is
last, so results are deterministic. Tensors of one pair of dtypes share a launch. Addresses read from a table carry no
alignment, so aligned tensors get kernels that say so, and full blocks go without a mask: loads
under a mask of unknown length stay scalar.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import is_
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.launch import launch
from trainc.kernels.parameter import multi_norm as operator
from trainc.kernels.parameter.triton_tables import Numbers, aligned, owner_of, pieces

BLOCK = 2048
CHUNK = 1 << 15
ROWS = 128
"""Partial sums that are loaded at once: 50,000 embeddings of 4096 numbers leave 6250."""
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
def _add_partials(PARTIAL, OUT, first, last, ROWS: tl.constexpr):
    """The four sums of rows [first, last) of PARTIAL in OUT."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 4)[None, :]
    total = tl.zeros((ROWS, 4), tl.float64)
    for start in range(first, last, ROWS):
        mask = (start + row < last) & (column < 4)
        # Other programs wrote them: past the first cache.
        total += tl.load(
            PARTIAL + (start + row) * 4 + column, mask=mask, other=0.0, cache_modifier=".cg"
        )
    tl.store(OUT + tl.arange(0, 4), tl.sum(total, 0))


@triton.jit(do_not_specialize=["tensors"])
def partial_sums(
    TABLE, PARTIAL, OUT, tensors,
    W: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (chunks,): PARTIAL (chunks, 4), and each tensor's sum of them in its row of OUT. TABLE is `_listed`'s."""
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
    part = PARTIAL + pid.to(tl.int64) * 4
    # A lane holds few terms, whose float32 sum is good; across lanes it would add their errors.
    tl.store(part, tl.sum(ww.to(tl.float64), 0))
    tl.store(part + 1, tl.sum(dd.to(tl.float64), 0))
    tl.store(part + 2, tl.sum(wd.to(tl.float64), 0))
    tl.store(part + 3, tl.sum(broken, 0).to(tl.float64))
    # All threads have stored before the program is counted, and none reads before it was.
    tl.debug_barrier()
    before = tl.atomic_add(ENDS + tensors + 1 + tensor, 1, sem="acq_rel")
    first, last = tl.load(ENDS + tensor), tl.load(ENDS + tensor + 1)
    if before == last - first - 1:
        tl.debug_barrier()
        out = OUT + tl.load(TABLE + 3 * tensors + tensor) * 4
        _add_partials(PARTIAL, out, first, last, ROWS)


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
    """Addresses of the tensors and of the others, sizes, rows of the result, and the chunk each tensor begins with.

    Behind them is how many of each tensor's programs are done, which the kernel counts. An empty tensor has a chunk,
    too: its sums are written like others.
    """
    ends = accumulate((max(1, pieces(size, chunk)) for size in sizes), initial=0)
    return [*tensors, *others, *sizes, *rows, *ends, *[0] * len(tensors)]


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
        found.append(_Group(places, pair, wide, Numbers(numbers), numbers[5 * len(places)]))
    return tuple(found)


# The least recently used goes first. Entries are few, for one holds a few numbers a tensor; lists of few tensors, which
# may be many (a parameter at a time) and cost little, would only push out those that are worth keeping.
_kept_groups = lru_cache(maxsize=16)(groups)
FEW = 8


def _sums(group: _Group, table: Numbers, paired: bool, out: Tensor) -> None:
    """Fill a group's rows of `out`."""
    partial = torch.empty((group.chunks, operator.COLUMNS), dtype=torch.float64, device=out.device)
    left, right = group.dtypes
    launch(
        partial_sums, (group.chunks,),
        table.on(out.device), partial, out, len(group.places),
        W=TYPES[left], D=TYPES[right], PAIRED=paired, ALIGNED=group.aligned,
        CHUNK=CHUNK, BLOCK=BLOCK, ROWS=ROWS, num_warps=4,
    )  # fmt: skip


def _groups_of(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[_Group, ...]:
    """What is launched for contiguous tensors and deltas."""
    addresses, others = (tuple([one.data_ptr() for one in every]) for every in (left, right))
    dtypes, other_dtypes = (tuple([one.dtype for one in every]) for every in (left, right))
    sizes = tuple([one.numel() for one in left])
    found = _kept_groups if len(left) > FEW else groups
    return found(addresses, others, sizes, dtypes, other_dtypes, CHUNK)


def multi_norm(
    tensors: Sequence[Tensor], deltas: Sequence[Tensor], kept: dict[str, Any] | None = None
) -> Tensor:
    """The CUDA kernel of trainc::multi_norm; `kept` is what it left in a call with these same tensors."""
    left, right = tensors, deltas
    known = None if kept is None else kept.get("groups")
    if known is None:
        operator.check_shapes(tensors, deltas)
        # A square has no sign, but a product has.
        left, right = (
            [one.resolve_neg().contiguous() for one in every] for every in (tensors, deltas)
        )
        known = _groups_of(left, right)
        as_given = all(map(is_, (*left, *right), (*tensors, *deltas)))
        if kept is not None and as_given:
            kept["groups"] = known
    size, device = (len(left), operator.COLUMNS), left[0].device
    result = torch.empty(size, dtype=torch.float64, device=device)
    for group in known:
        if group.table is not None:
            _sums(group, group.table, bool(deltas), result)
            continue
        mine, other = ([one[i] for i in group.places] if one else [] for one in (left, right))
        for place, sums in zip(group.places, operator.eager(mine, other), strict=True):
            result[place].copy_(sums)
    return result
