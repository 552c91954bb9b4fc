"""A linear layer's weight gradient together with every example's squared norm, by one of two algorithms.

With T rows per example (all middle dims) they give the same numbers (arXiv 2411.00999):

  simultaneous  every example's (L, K) gradient by a batched product; squared, and added up to the
                batch's gradient: the operations of the plain gradient, but K * L numbers an example
  gram          <X X', dY dY'>, two (T, T) matrices an example, beside the plain gradient

By operations alone gram wins below T = sqrt(K L / (K + L)), and by memory below sqrt(K L / 2).
"""

import math

import torch
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED, accumulation_dtype

ALGORITHMS = ("auto", "simultaneous", "gram")

# A number of an example's gradient is written and read twice, which costs as much as 16 or so
# multiplications: gram pays up to sqrt(16) times the rows that counting operations would allow.
ENTRY_COST = 16

# Numbers of per-example gradients held at once: within a core's cache, or what keeps a device busy.
HELD_CPU = 1 << 17
HELD_DEVICE = 1 << 26
# Numbers that one float32 sum of squares may take in.
LONGEST_SUM = 1 << 14


def choose(rows: int, inputs: int, outputs: int) -> str:
    """Choose `gram` if it is cheaper for examples of this many rows and holds fewer numbers, else `simultaneous`."""
    cheap = rows * rows * (inputs + outputs) < ENTRY_COST * inputs * outputs
    return "gram" if cheap and 2 * rows * rows <= inputs * outputs else "simultaneous"


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


def norms_and_gradient(
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
