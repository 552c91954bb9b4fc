"""Rows of two views read by whole vectors, for the Triton kernels of losses.

Loads are of up to `VECTOR` logits that start at multiples of their number in memory, wherever a row starts: 16 bytes in
16 bits, the most a thread loads at once. What a row's first and last vector hold of its neighbours is masked after it
is loaded.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl

from trainc.kernels.library.grid import power_of_2

VECTOR = 8


def lay(count: int, classes: int) -> dict[str, int]:
    """How the rows of logits (2 * count, classes) lie in memory, as options of a kernel.

    W is the width of a vector: the most for which both views of a row begin at the same place within one. EVEN says
    that each row starts and ends with a vector.
    """
    width = VECTOR
    while count * classes % width:
        width //= 2
    return {"W": width, "EVEN": classes % width == 0}


def vectors(block: int, classes: int, width: int) -> int:
    """Vectors a program takes at once: `block` classes, or a whole row where that is less."""
    return max(1, min(block, power_of_2(classes + width - 1)) // width)


@triton.jit
def vectors_of_row(row, rows, classes, W: tl.constexpr):
    """Where both views' vectors begin, and how many entries before the row the first has."""
    one, two = row * classes, (row + rows) * classes
    return one // W * W, two // W * W, (one % W).to(tl.int32)


@triton.jit
def entries_of(block, before, classes, W: tl.constexpr, EVEN: tl.constexpr, V: tl.constexpr):
    """For a block of V vectors: each entry's place from the first vector on, which are the row's, and which to load."""
    vector = block * V + tl.arange(0, V)
    place = vector[:, None] * W + tl.arange(0, W)[None, :]
    begun = tl.broadcast_to((vector * W < before + classes)[:, None], [V, W])
    if EVEN:
        return place, begun, begun
    return place, (place >= before) & (place < before + classes), begun


@triton.jit
def is_whole(block, before, classes, SPAN: tl.constexpr):
    """Whether every entry of a block of SPAN entries is the row's."""
    return (block * SPAN >= before) & ((block + 1) * SPAN <= before + classes)


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
