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
# Bytes of a word; a device reads none from other places than multiples of this.
WORD = 4


def lay(count: int, classes: int, *, odd: bool = False) -> dict[str, int]:
    """How the rows of logits (2 * count, classes) lie in memory, as options of a kernel.

    W is the width of a vector: the most for which both views of a row begin at the same place within one. EVEN says
    that each row starts and ends with a vector. `odd` says that the logits begin within a word, as of a slice they may:
    then no two are read as one.
    """
    width = 1 if odd else VECTOR
    while count * classes % width:
        width //= 2
    return {"W": width, "EVEN": classes % width == 0}


def lay_to_read(count: int, classes: int, *, odd: bool = False) -> dict[str, int]:
    """As `lay`, for a kernel that only reads: the first view's vectors are whole wherever the second one's lie.

    OTHER is how many of the second view's logits are read at once in their place: as many as `lay` has in a vector. A
    vector of the first view may end in the second one, which has as many numbers, but not behind it.
    """
    lies = lay(count, classes, odd=odd)
    width = lies["W"] if odd or count * classes < VECTOR else VECTOR
    return {"W": width, "EVEN": classes % width == 0, "OTHER": lies["W"]}


def vectors(block: int, classes: int, width: int) -> int:
    """Vectors a program takes at once: `block` classes, or a whole row where that is less."""
    return max(1, min(block, power_of_2(classes + width - 1)) // width)


@triton.jit
def vectors_of_row(row, rows, classes, W: tl.constexpr, OTHER: tl.constexpr):
    """Where both views' vectors begin, and how many entries before the row the first has.

    The second view's begin at a multiple of OTHER, and its row at the same entry of them.
    """
    one = row * classes
    before = one % W
    two = (row + rows) * classes - before
    return one // W * W, two // OTHER * OTHER, before.to(tl.int32)


@triton.jit
def entries_of(block, before, classes, W: tl.constexpr, EVEN: tl.constexpr, V: tl.constexpr):
    """For a block of V vectors: each entry's place from the first vector on, and which are the row's."""
    vector = block * V + tl.arange(0, V)
    place = vector[:, None] * W + tl.arange(0, W)[None, :]
    if EVEN:
        return place, tl.broadcast_to((vector * W < before + classes)[:, None], [V, W])
    return place, (place >= before) & (place < before + classes)


@triton.jit
def is_whole(block, before, classes, SPAN: tl.constexpr):
    """Whether every entry of a block of SPAN entries is the row's."""
    return (block * SPAN >= before) & ((block + 1) * SPAN <= before + classes)


@triton.jit
def _loaded(P, vector, end, whole, V: tl.constexpr, W: tl.constexpr, APART: tl.constexpr):
    """Vectors of W numbers each from P on: of a block that is whole all, else those that begin before the end.

    APART has each number asked for itself: a vector that lies across multiples of its size may end behind the memory.
    """
    place = vector[:, None] * W + tl.arange(0, W)[None, :]
    if whole:
        found = tl.load(P + place)
    else:
        begun = place < end if APART else tl.broadcast_to((vector * W < end)[:, None], [V, W])
        found = tl.load(P + place, mask=begun, other=0)
    return found


@triton.jit
def _one_view(
    L, at, vector, end, whole,
    W: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Vectors of W logits from `at` on, a multiple of ALIGNED."""
    apart: tl.constexpr = ALIGNED < W
    # What stands behind a `return` is compiled, too; the other branch of what is known is not.
    if WORDS and L.dtype.element_ty == tl.bfloat16 and ALIGNED > 1:
        # Two bfloat16 are the halves of a word: one instruction makes each a float32, where a number apart takes two.
        words = (L + at).to(tl.pointer_type(tl.int32), bitcast=True)
        word = _loaded(words, vector, (end + 1) // 2, whole, V, W // 2, apart)
        low, high = word << 16, word & -65536
        both = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
        found = tl.reshape(both, [V, W])
    else:
        found = _loaded(L + at, vector, end, whole, V, W, apart).to(tl.float32)
    return found


@triton.jit
def both_views(
    L, one, two, block, before, classes, whole,
    W: tl.constexpr, OTHER: tl.constexpr, V: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The entries of a block of V vectors of both views in float32; a block that is whole is loaded without a mask.

    WORDS has them read as words where there are two in one: for kernels that write nothing to the same places, which
    would otherwise be counted twice.
    """
    vector, end = block * V + tl.arange(0, V), before + classes
    return (
        _one_view(L, one, vector, end, whole, W, V, W, WORDS and OTHER > 1),
        _one_view(L, two, vector, end, whole, W, V, OTHER, WORDS),
    )
