"""Linear layer whose backward also returns per-example squared gradient norms.

With T rows per example (all middle dims), two algorithms give the same numbers (arXiv 2411.00999):

  simultaneous  every example's (L, K) gradient by a batched product; squared, and added up to the
                batch's gradient: the operations of the plain gradient, but K * L numbers an example
  gram          <X X', dY dY'>, two (T, T) matrices an example, beside the plain gradient

By operations alone gram wins below T = sqrt(K L / (K + L)), and by memory below sqrt(K L / 2).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import (
    REDUCED,
    absent,
    accumulation_dtype,
    autocast,
    check_bias,
    check_probe,
    lazy,
    require,
)
from trainc.kernels.library.register import register

__all__ = ["linear"]

ALGORITHMS = ("auto", "simultaneous", "gram")

# From x (B, T, K), dy (B, T, L), an algorithm and the weight's dtype: its gradient or None, and norms.
Norms = Callable[[Tensor, Tensor, str, torch.dtype], tuple[Tensor | None, Tensor]]

# A number of an example's gradient is written and read twice, which costs as much as 16 or so
# multiplications: gram pays up to sqrt(16) times the rows that counting operations would allow.
ENTRY_COST = 16

# Numbers of per-example gradients held at once: within a core's cache, or what keeps a device busy.
HELD_CPU = 1 << 17
HELD_DEVICE = 1 << 26
# Numbers that one float32 sum of squares may take in.
LONGEST_SUM = 1 << 14


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """Compute x @ weight.T + bias.

    `x` is (B, ..., K), `weight` (L, K) and `bias` (L,) or None, of one floating dtype; an example is dim 0 of x.
    `probe` is None, or zeros (B, 2), (B, 1) without bias, in float32 (float64 for float64 x) that require grad. It is
    not read: its gradient is, per example, the squared norm of its contribution to weight.grad (column 0) and bias.grad
    (column 1), in the units of those gradients. Like any gradient it accumulates: take a new probe for each backward
    pass. `algorithm` says how the norms of the weight are made: from every example's gradient ("simultaneous"), from
    products of rows with rows ("gram"), or by what is cheaper for the shapes ("auto"); the numbers are the same.

    Returns (B, ..., L) in x's dtype, under autocast in its 16-bit one (float64 stays). Without a probe this is
    F.linear. Raises RuntimeError for other shapes, dtypes and algorithms. With a probe, second derivatives raise
    RuntimeError and forward-mode ones NotImplementedError.

    Source of the norms: Goodfellow 2015, arXiv:1510.01799 (one row an example); Gray et al. 2024, arXiv:2411.00999.
    """
    check_algorithm(algorithm)
    if probe is None:
        return functional.linear(x, weight, bias)
    cast = autocast(x, weight, bias)
    y: Tensor = torch.ops.trainc.linear(*cast, probe, algorithm)
    return y


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """dweight, dbias and the norms by definition, one example at a time, in the dtype of x."""
    norms, gain, shift = [], torch.zeros_like(weight), dy.new_zeros(dy.shape[-1])
    for example in range(x.shape[0]):
        one, grad = x[example].reshape(-1, x.shape[-1]), dy[example].reshape(-1, dy.shape[-1])
        each, total = grad.T @ one, grad.sum(0)
        norms.append(torch.stack([each.square().sum(), total.square().sum()]))
        gain, shift = gain + each, shift + total
    columns = 1 if bias is None else 2
    stacked = torch.stack(norms)[:, :columns] if norms else x.new_zeros(0, columns)
    return {"dweight": gain, "dbias": shift, "norms": stacked}


def choose(rows: int, inputs: int, outputs: int) -> str:
    """The cheaper algorithm for examples of so many rows that also holds the fewer numbers."""
    cheap = rows * rows * (inputs + outputs) < ENTRY_COST * inputs * outputs
    return "gram" if cheap and 2 * rows * rows <= inputs * outputs else "simultaneous"


def check_algorithm(algorithm: str) -> None:
    """Reject an algorithm of another name."""
    if algorithm not in ALGORITHMS:
        raise RuntimeError(f"algorithm must be one of {ALGORITHMS}, not {algorithm!r}")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, algorithm: str
) -> None:
    check_algorithm(algorithm)
    require(
        x.dim() >= 2 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"x must be (B, ..., K) and weight (L, K), not {tuple(x.shape)} and {tuple(weight.shape)}"
        ),
    )
    check_bias(bias, weight)
    require(
        x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype),
        lambda: (
            f"weight and bias must have the dtype of x, {x.dtype}, "
            f"not {[t.dtype for t in (weight, bias) if t is not None]}"
        ),
    )
    check_probe(probe, x.shape[0], 1 if bias is None else 2, x)


def eager_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, algorithm: str
) -> Tensor:
    _check(x, weight, bias, probe, algorithm)
    return functional.linear(x, weight, bias).contiguous()


def fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, algorithm: str
) -> Tensor:
    _check(x, weight, bias, probe, algorithm)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched left @ right in the accumulation dtype, on a CPU in the memory of `out`."""
    if left.is_cuda and left.dtype in REDUCED:
        wide: Tensor = torch.bmm(left, right, out_dtype=torch.float32)
        return wide
    dtype = accumulation_dtype(left.dtype)
    return torch.bmm(left.to(dtype), right.to(dtype), out=out)


def _chunks(examples: int, each: int, like: Tensor) -> range:
    """Starts of chunks of examples that hold about as many numbers as the device should."""
    held = HELD_CPU if like.device.type == "cpu" else HELD_DEVICE
    return range(0, examples, max(1, held // max(each, 1)))


def _simultaneous(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(L, K) gradient and (B,) norms from x (B, T, K) and dy (B, T, L)."""
    examples, inputs, outputs = x.shape[0], x.shape[2], dy.shape[2]
    dtype, starts = accumulation_dtype(x.dtype), _chunks(examples, inputs * outputs, x)
    total = x.new_zeros((outputs, inputs), dtype=dtype)
    # Some thousands of squares to a sum: a long one would lose digits in float32, short ones time.
    width = inputs * math.gcd(outputs, max(1, LONGEST_SUM // max(inputs, 1)))
    parts = x.new_empty((examples, outputs * inputs // max(width, 1)), dtype=dtype)
    # Fresh memory for every chunk would cost more than reading it does.
    shape = (min(starts.step, examples), outputs, inputs)
    held = None if x.is_cuda else x.new_empty(shape, dtype=dtype)
    ones = x.new_ones(shape[0], dtype=dtype)
    for start in starts:
        here = slice(start, min(start + starts.step, examples))
        memory = None if held is None else held[: here.stop - start]
        each = _product(dy[here].transpose(1, 2), x[here], memory)
        # A norm reads its numbers once, where a dot product writes their squares before it adds them.
        rows = each.view(-1, parts.shape[1], width)
        torch.linalg.vector_norm(rows, dim=2, out=parts[here])
        # One pass, where a sum and an addition take two.
        total.view(-1).addmv_(each.flatten(1).t(), ones[: each.shape[0]])
    return total, torch.linalg.vecdot(parts, parts)


def gram(x: Tensor, dy: Tensor) -> Tensor:
    """(B,) norms from x (B, T, K) and dy (B, T, L)."""
    if x.shape[1] == 1:
        dtype = accumulation_dtype(x.dtype)
        a, b = x[:, 0].to(dtype), dy[:, 0].to(dtype)
        single: Tensor = torch.linalg.vecdot(a, a) * torch.linalg.vecdot(b, b)
        return single
    step = _chunks(x.shape[0], 2 * x.shape[1] ** 2, x).step
    pairs = [(x, dy)] if step >= x.shape[0] else zip(x.split(step), dy.split(step), strict=True)
    # Rounding may leave a hair below zero where an example's contribution cancels.
    parts = [_inner(a, b).clamp_(min=0) for a, b in pairs]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _inner(x: Tensor, dy: Tensor) -> Tensor:
    """<X X', dY dY'> of each example."""
    inner, outer = (_product(t, t.transpose(1, 2)) for t in (x, dy))
    return inner.mul_(outer).sum((1, 2))


def eager_norms(
    x: Tensor, dy: Tensor, algorithm: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """The weight's gradient in dtype, where the algorithm makes it, and the (B,) norms."""
    _, rows, inputs = x.shape
    if algorithm == "auto":
        algorithm = "gram" if rows == 1 else choose(rows, inputs, dy.shape[2])
    if algorithm == "gram" and x.shape[0]:
        return None, gram(x, dy)
    total, norms = _simultaneous(x, dy)
    return total.to(dtype), norms


def backward(
    norms_of: Norms, dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, algorithm: str,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias and the norms; results not asked for have no elements."""
    rows = math.prod(x.shape[1:-1])
    one, grad = (t.reshape(t.shape[0], rows, t.shape[-1]) for t in (x, dy))
    dx, dbias = absent(x), absent(x)
    flat = grad.flatten(0, 1)
    if mask[0]:
        dx = torch.mm(flat, weight).view(x.shape)
    columns: list[Tensor] = []
    dweight: Tensor | None = None
    if with_norms:
        dweight, norms = norms_of(one, grad, algorithm, weight.dtype)
        columns.append(norms)
    if not mask[1]:
        dweight = absent(x)
    elif dweight is None:
        dweight = torch.mm(flat.t(), one.flatten(0, 1))
    if has_bias and (with_norms or mask[2]):
        each = grad.sum(1, dtype=accumulation_dtype(x.dtype))
        columns.append(torch.linalg.vecdot(each, each))
        dbias = each.sum(0).to(weight.dtype) if mask[2] else dbias
    return dx, dweight, dbias, torch.stack(columns, 1) if with_norms else absent(x)


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, algorithm: str,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same on any device, by ATen's calls."""
    return backward(eager_norms, dy, x, weight, has_bias, algorithm, mask, with_norms)


def fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, algorithm: str,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if mask[0] else absent(x)
    dweight = weight.new_empty(weight.shape) if mask[1] else absent(x)
    dbias = weight.new_empty(weight.shape[:1]) if has_bias and mask[2] else absent(x)
    shape = (x.shape[0], 2 if has_bias else 1)
    norms = x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) if with_norms else absent(x)
    return dx, dweight, dbias, norms


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, algorithm = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.algorithm = bias is not None, algorithm


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    found = torch.ops.trainc.linear_backward(
        dy, x, weight, ctx.has_bias, ctx.algorithm, list(wants[:3]), wants[3]
    )
    return *(g if wanted else None for g, wanted in zip(found, wants, strict=False)), None


register(
    "linear",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "linear_backward",
    cpu=eager_backward,
    cuda=lazy("layer.triton_linear_launch", "linear_backward"),
    fake=fake_backward,
)
