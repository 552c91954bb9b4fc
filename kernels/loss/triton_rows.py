"""Rows of two views read by whole vectors, for the Triton kernels of losses.

Loads are of `VECTOR` logits that start at multiples of it in memory, wherever a row starts: 16 bytes in 16 bits, the
most a thread loads at once. What a row's first and last vector hold of its neighbours is masked after it is loaded.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl

from trainc.kernels.library.grid import power_of_2

VECTOR = 8
# How rows lie to vectors. ROWS: each starts and ends with one. VIEWS: both views of a row begin at the same place
# within one. APART: neither, and every logit is loaded by itself.
APART, VIEWS, ROWS = 0, 1, 2
_VECTOR = tl.constexpr(VECTOR)
_ROWS, _APART = tl.constexpr(ROWS), tl.constexpr(APART)


def lay(count: int, classes: int) -> int:
    """How the rows of logits (2 * count, classes) lie to vectors that start at multiples of `VECTOR`."""
    if classes % VECTOR == 0:
        return ROWS
    return VIEWS if count * classes % VECTOR == 0 else APART


def vectors(block: int, classes: int) -> int:
    """Vectors a program takes at once: `block` classes, or a whole row where that is less."""
    return max(1, min(block, power_of_2(classes + VECTOR - 1)) // VECTOR)


@triton.jit
def vectors_of_row(row, rows, classes, LAY: tl.constexpr):
    """Where both views' vectors begin, and how many entries before the row the first has."""
    one, two = row * classes, (row + rows) * classes
    if LAY == _APART:
        return one, two, tl.full((), 0, tl.int32)
    return one // _VECTOR * _VECTOR, two // _VECTOR * _VECTOR, (one % _VECTOR).to(tl.int32)


@triton.jit
def entries_of(block, before, classes, LAY: tl.constexpr, V: tl.constexpr):
    """For a block of V vectors: each entry's place from the first vector on, which are the row's, and which to load."""
    vector = block * V + tl.arange(0, V)
    place = vector[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    begun = tl.broadcast_to((vector * _VECTOR < before + classes)[:, None], [V, _VECTOR])
    if LAY == _ROWS:
        return place, begun, begun
    valid = (place >= before) & (place < before + classes)
    if LAY == _APART:
        return place, valid, valid
    return place, valid, begun


@triton.jit
def is_whole(block, before, classes, V: tl.constexpr):
    """Whether every entry of a block is the row's."""
    return (block * V * _VECTOR >= before) & ((block + 1) * V * _VECTOR <= before + classes)


@triton.jit
def both_views(L, one, two, place, loaded, whole):
    """The entries of both views in float32; a block that is whole is loaded without a mask."""
    if whole:
        x = tl.load(L + one + place).to(tl.float32)
        y = tl.load(L + two + place).to(tl.float32)
    else:
        x = tl.load(L + one + place, mask=loaded, other=0.0).to(tl.float32)
        y = tl.load(L + two + place, mask=loaded, other=0.0).to(tl.float32)
    return x, y
