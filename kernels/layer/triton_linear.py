"""Triton kernels for per-example norms of linear layers; imported by the first CUDA call.

`weight_gradient` is the plain gradient's product, one tile of it a program, that walks example by
example: what is summed since an example began is squared when it ends and added to the tile's
total, so no example's (L, K) gradient reaches memory. Its loop over examples and rows is one loop:
the loads of an example's first rows are under way while the last one's products are taken.

`gram` is <X X', dY dY'> by tiles of the upper triangle, both products of a tile in registers.

Products run on the tensor cores in OPERAND with float32 sums; PRECISION is what float32 operands
are multiplied in. Each partial result is one program's and is stored, never added to another's:
results are deterministic. Operands are as wide as they are loaded; only the interpreter, which has
no bfloat16 arithmetic, is given another OPERAND.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def _place(pid, tiles_l, tiles_k, GROUP: tl.constexpr):
    """The tile of a program: columns of GROUP tiles, so that neighbours share what they load."""
    width = GROUP * tiles_k
    first = pid // width * GROUP
    height = tl.minimum(tiles_l - first, GROUP)
    return first + pid % width % height, pid % width // height


@triton.jit(do_not_specialize=["examples", "rows", "tiles_l", "tiles_k", "share"])
def weight_gradient(
    X, DY, TOTAL, SQUARES, examples, rows, inputs, outputs, tiles_l, tiles_k, share,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, groups): TOTAL (groups, L, K) over `share` examples, SQUARES (B, tiles)."""
    tile, group = tl.program_id(0), tl.program_id(1)
    tile_l, tile_k = _place(tile, tiles_l, tiles_k, GROUP)
    out = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)
    into = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_T)
    in_out, in_into = out < outputs, into < inputs
    begin = group * share
    count = tl.minimum(share, examples - begin)
    blocks = tl.cdiv(rows, BLOCK_T)
    total = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
    since = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
    for step in tl.range(0, count * blocks, num_stages=STAGES):
        example = begin + step // blocks
        block = step % blocks
        here = block * BLOCK_T + row
        in_rows = here < rows
        at = (tl.full((), 0, tl.int64) + example) * rows + here
        dy = tl.load(
            DY + at[:, None] * outputs + out[None, :],
            mask=in_rows[:, None] & in_out[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            X + at[:, None] * inputs + into[None, :],
            mask=in_rows[:, None] & in_into[None, :], other=0.0,
        )  # fmt: skip
        since = tl.dot(tl.trans(dy.to(OPERAND)), x.to(OPERAND), since, input_precision=PRECISION)
        if block == blocks - 1:
            tl.store(
                SQUARES + example.to(tl.int64) * tiles_l * tiles_k + tile,
                tl.sum(tl.sum(since * since, 1), 0),
            )
            total += since
            since = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
    at = (group.to(tl.int64) * outputs + out)[:, None] * inputs + into[None, :]
    tl.store(TOTAL + at, total.to(TOTAL.dtype.element_ty), mask=in_out[:, None] & in_into[None, :])


@triton.jit
def _products(
    A, first, left, right, rows, width,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Inner products of the rows `left` and `right` of the example that begins at row `first`."""
    lane = tl.arange(0, BLOCK_C)
    in_left, in_right = left < rows, right < rows
    above = A + (first + left)[:, None] * width
    below = A + (first + right)[None, :] * width
    found = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in tl.range(0, width, BLOCK_C, num_stages=STAGES):
        column = start + lane
        inside = column < width
        a = tl.load(above + column[None, :], mask=in_left[:, None] & inside[None, :], other=0.0)
        b = tl.load(below + column[:, None], mask=in_right[None, :] & inside[:, None], other=0.0)
        found = tl.dot(a.to(OPERAND), b.to(OPERAND), found, input_precision=PRECISION)
    return found


@triton.jit(do_not_specialize=["rows", "tiles", "pairs"])
def gram(
    X, DY, PARTIAL, rows, inputs, outputs, tiles, pairs,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (examples * pairs,): PARTIAL (B, pairs), a pair (i, j >= i) of tiles of BLOCK_T rows."""
    pid = tl.program_id(0)
    example, pair = pid // pairs, pid % pairs
    # Rows of the triangle are read off one after another: there are few.
    i, rest = 0, pair
    while rest >= tiles - i:
        rest -= tiles - i
        i += 1
    j = i + rest
    lane = tl.arange(0, BLOCK_T)
    left, right = i * BLOCK_T + lane, j * BLOCK_T + lane
    first = example.to(tl.int64) * rows
    inner = _products(
        X, first, left, right, rows, inputs, OPERAND, PRECISION, STAGES, BLOCK_T, BLOCK_C
    )
    outer = _products(
        DY, first, left, right, rows, outputs, OPERAND, PRECISION, STAGES, BLOCK_T, BLOCK_C
    )
    found = tl.sum(tl.sum(inner * outer, 1), 0)
    # Tiles off the diagonal stand for their mirror images too.
    found = tl.where(i == j, found, 2.0 * found)
    tl.store(PARTIAL + pid, found)
