"""Triton kernels for LayerNorm and RMSNorm; imported by the first CUDA call of either.

With ADD the input is a residual sum: forward adds and stores it, and backward adds to dx the
gradient that reached the sum (DTOTAL) before writing it. OFFSET adds one to the weight.

Backward reads x and dy once and writes dx once, whatever is measured. Rows of one example never
share a program with rows of another, so a program's weight sum belongs to one example and its
square is that example's. Three regimes, all without atomics and so deterministic:

  rows    one row an example: its square is a sum along the row, and programs walk over many rows
  whole   many examples: a program walks over whole examples, squares each example's sum in
          registers, and leaves one partial row for the batch's gradient
  split   few examples: (example, chunk) programs leave partial rows that `norm_finish` adds per
          example and squares

STAGES 2 copies the next tile to shared memory while this one is reduced.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def norm_forward(
    X, RESIDUAL, TOTAL, W, B, Y, MEAN, RSTD, rows, width, eps,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y and the float32 statistics of BLOCK_R rows of x, or with ADD of x + residual, stored."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    in_row, in_column = row < rows, column < width
    mask = in_row[:, None] & in_column[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(RESIDUAL + at, mask=mask, other=0.0).to(tl.float32)
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=mask)
        x = total.to(tl.float32)  # backward sees the rounded sum, so the statistics must be its
    if not RMS:
        mean = tl.sum(x, 1) / width
        tl.store(MEAN + row, mean, mask=in_row)
        x = tl.where(in_column[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(RSTD + row, rstd, mask=in_row)
    y = x * rstd[:, None]
    if LLAMA:
        y = y.to(TOTAL.dtype.element_ty).to(tl.float32)
    if HAS_W:
        w = tl.load(W + column, mask=in_column, other=0.0).to(tl.float32)
        if OFFSET:
            w += 1.0
        y = y * w[None, :]
    if HAS_B:
        y = y + tl.load(B + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    X, DY, DTOTAL, DX, MEAN, RSTD, w, first, row, last, column, width,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, WRITE_DX: tl.constexpr,
):  # fmt: skip
    """Write dx for rows [row, last) of the example at `first`; return dy * unit and dy."""
    in_row, in_column = row < last, column < width
    mask = in_row[:, None] & in_column[None, :]
    absolute = first + row
    at = absolute[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + absolute, mask=in_row, other=0.0).to(tl.float32)
    if not RMS:
        mean = tl.load(MEAN + absolute, mask=in_row, other=0.0).to(tl.float32)
        x = tl.where(in_column[None, :], x - mean[:, None], 0.0)
    unit = x * rstd[:, None]
    if WRITE_DX:
        g = dy * w[None, :]
        along = tl.sum(g * unit, 1) / width
        dx = g - unit * along[:, None]
        if not RMS:
            dx = dx - (tl.sum(g, 1) / width)[:, None]
        dx = dx * rstd[:, None]
        if ADD:
            dx += tl.load(DTOTAL + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
    if LLAMA:
        unit = unit.to(X.dtype.element_ty).to(tl.float32)
    return dy * unit, dy


@triton.jit
def norm_backward_whole(
    X, W, DY, DTOTAL, DX, MEAN, RSTD, PW, PB, NORMS, examples, rows, width, programs,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, WRITE_DX: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): whole examples pid, pid + programs, ..; partial rows (programs, width)."""
    pid = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    in_column = column < width
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_W:
        w = tl.load(W + column, mask=in_column, other=0.0).to(tl.float32)
        if OFFSET:
            w += 1.0
    total_w = tl.zeros((BLOCK_C,), tl.float32)
    total_b = tl.zeros((BLOCK_C,), tl.float32)
    for example in range(pid, examples, programs):
        sum_w = tl.zeros((BLOCK_C,), tl.float32)
        sum_b = tl.zeros((BLOCK_C,), tl.float32)
        first = (tl.full((), 0, tl.int64) + example) * rows
        for start in tl.range(0, rows, BLOCK_R, num_stages=STAGES):
            row = start + tl.arange(0, BLOCK_R)
            part_w, part_b = _tile(
                X, DY, DTOTAL, DX, MEAN, RSTD, w, first, row, rows, column, width,
                ADD, RMS, LLAMA, WRITE_DX,
            )  # fmt: skip
            sum_w += tl.sum(part_w, 0)
            if HAS_B:
                sum_b += tl.sum(part_b, 0)
        if HAS_W:
            tl.store(NORMS + example * COLUMNS, tl.sum(sum_w * sum_w, 0))
        if HAS_B:
            tl.store(NORMS + example * COLUMNS + 1, tl.sum(sum_b * sum_b, 0))
        total_w += sum_w
        total_b += sum_b
    out = pid.to(tl.int64) * width + column
    if HAS_W:
        tl.store(PW + out, total_w, mask=in_column)
    if HAS_B:
        tl.store(PB + out, total_b, mask=in_column)


@triton.jit
def norm_backward_split(
    X, W, DY, DTOTAL, DX, MEAN, RSTD, PW, PB, NORMS, rows, width, chunks, chunk_rows,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, WRITE_DX: tl.constexpr, ROW_NORMS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (examples * chunks,): a chunk of an example; partials (examples, chunks, width).

    With ROW_NORMS there is one example in name, and each of its rows stores norms of its own.
    """
    pid = tl.program_id(0)
    example, chunk = pid // chunks, pid % chunks
    column = tl.arange(0, BLOCK_C)
    in_column = column < width
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_W:
        w = tl.load(W + column, mask=in_column, other=0.0).to(tl.float32)
        if OFFSET:
            w += 1.0
    sum_w = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    first = example.to(tl.int64) * rows
    low = chunk * chunk_rows
    high = tl.minimum(low + chunk_rows, rows)
    for start in tl.range(low, high, BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        part_w, part_b = _tile(
            X, DY, DTOTAL, DX, MEAN, RSTD, w, first, row, high, column, width,
            ADD, RMS, LLAMA, WRITE_DX,
        )  # fmt: skip
        sum_w += tl.sum(part_w, 0)
        if HAS_B:
            sum_b += tl.sum(part_b, 0)
        if ROW_NORMS:
            norms = NORMS + (first + row) * COLUMNS
            if HAS_W:
                tl.store(norms, tl.sum(part_w * part_w, 1), mask=row < high)
            if HAS_B:
                tl.store(norms + 1, tl.sum(part_b * part_b, 1), mask=row < high)
    out = pid.to(tl.int64) * width + column
    if HAS_W:
        tl.store(PW + out, sum_w, mask=in_column)
    if HAS_B:
        tl.store(PB + out, sum_b, mask=in_column)


@triton.jit
def norm_finish(
    PARTIAL, EACH, SQUARES, examples, chunks, width, first,
    COLUMNS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (examples * column blocks, kinds): sums over chunks, and their squares.

    PARTIAL is (COLUMNS, examples, chunks, width), EACH (COLUMNS, examples, width) and SQUARES
    (examples, COLUMNS, column blocks); `first` is the first kind there is: 0 weight, 1 bias.
    """
    pid, kind = tl.program_id(0), tl.program_id(1) + first
    example, block = pid % examples, pid // examples
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_column = column < width
    line = kind.to(tl.int64) * examples + example
    parts = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, chunks, BLOCK_S):
        chunk = start + tl.arange(0, BLOCK_S)
        mask = (chunk < chunks)[:, None] & in_column[None, :]
        at = (line * chunks + chunk)[:, None] * width + column[None, :]
        parts += tl.load(PARTIAL + at, mask=mask, other=0.0).to(tl.float32)
    each = tl.sum(parts, 0)
    tl.store(EACH + line * width + column, each, mask=in_column)
    blocks = tl.cdiv(width, BLOCK_C)
    square = SQUARES + (example.to(tl.int64) * COLUMNS + kind) * blocks + block
    tl.store(square, tl.sum(each * each, 0))
