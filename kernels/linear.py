"""Linear layer whose backward also returns per-example squared gradient norms.

Contract. `x` is (B, ..., K), `weight` (L, K), `bias` (L,) or None, of one floating dtype; `probe` is
(B, 2), or (B, 1) without bias, zeros in float32 (float64 for float64 x). An example is dim 0 of x.
The gradient of `probe` is, per example, the squared norm of its contribution to weight.grad and to
bias.grad, in the units of those gradients. Without a probe this is F.linear itself.

With T rows per example (all middle dims), two forms give the same numbers (arXiv 2411.00999):

  simultaneous  every example's (L, K) gradient by a batched product; squared, and added up to the
                batch's gradient: the operations of the plain gradient, but K * L numbers an example
  gram          <X X', dY dY'>, two (T, T) matrices an example, beside the plain gradient

By operations alone gram wins below T = sqrt(K L / (K + L)), and by memory below sqrt(K L / 2).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.support import REDUCED, absent, accumulation_dtype, require

FORMS = ("auto", "simultaneous", "gram")

# A number of an example's gradient is written and read twice, which costs as much as 16 or so
# multiplications: gram pays up to sqrt(16) times the rows that counting operations would allow.
ENTRY_COST = 16

# Numbers of per-example gradients held at once: within a core's cache, or what keeps a device busy.
HELD_CPU = 1 << 17
HELD_DEVICE = 1 << 26


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    form: str = "auto",
) -> Tensor:
    """x @ weight.T + bias, (B, ..., L); see the module for `probe` and `form`."""
    if probe is None:
        return functional.linear(x, weight, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as F.linear: everything in autocast's dtype
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = torch.ops.trainc.linear(x, weight, bias, probe, form)
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
    """The cheaper form for examples of so many rows that also holds the fewer numbers."""
    cheap = rows * rows * (inputs + outputs) < ENTRY_COST * inputs * outputs
    return "gram" if cheap and 2 * rows * rows <= inputs * outputs else "simultaneous"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, form: str) -> None:
    require(form in FORMS, lambda: f"form is one of {FORMS}, not {form!r}")
    require(
        x.dim() >= 2 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: f"x {tuple(x.shape)} is not (B, ..., K) for a weight {tuple(weight.shape)}",
    )
    require(
        bias is None or tuple(bias.shape) == tuple(weight.shape[:1]),
        lambda: f"bias must have the shape {tuple(weight.shape[:1])}",
    )
    if probe is None:
        return
    columns, expected = 1 if bias is None else 2, accumulation_dtype(x.dtype)
    require(
        probe.dim() == 2
        and probe.shape[0] == x.shape[0]
        and probe.shape[1] == columns
        and probe.dtype == expected,
        lambda: (
            f"probe must be ({x.shape[0]}, {columns}) {expected}, "
            f"not {tuple(probe.shape)} {probe.dtype}"
        ),
    )


@torch.library.custom_op("trainc::linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, form: str
) -> Tensor:
    _check(x, weight, bias, probe, form)
    return functional.linear(x, weight, bias).contiguous()


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, form: str) -> Tensor:
    _check(x, weight, bias, probe, form)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched left @ right in the accumulation dtype."""
    if left.dtype not in REDUCED:
        return torch.bmm(left, right)
    if left.is_cuda:
        wide: Tensor = torch.bmm(left, right, out_dtype=torch.float32)
        return wide
    return torch.bmm(left.float(), right.float())


def _chunks(examples: int, each: int, like: Tensor) -> range:
    """Starts of chunks of examples that hold about as many numbers as the device should."""
    held = HELD_CPU if like.device.type == "cpu" else HELD_DEVICE
    return range(0, examples, max(1, held // max(each, 1)))


def _simultaneous(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(L, K) gradient and (B,) norms from x (B, T, K) and dy (B, T, L)."""
    examples, inputs, outputs = x.shape[0], x.shape[2], dy.shape[2]
    dtype = accumulation_dtype(x.dtype)
    total, norms = x.new_zeros((outputs, inputs), dtype=dtype), x.new_empty(examples, dtype=dtype)
    starts = _chunks(examples, inputs * outputs, x)
    for start in starts:
        here = slice(start, start + starts.step)
        each = _product(dy[here].transpose(1, 2), x[here])
        flat = each.view(each.shape[0], -1)
        torch.linalg.vecdot(flat, flat, out=norms[here])
        total += each[0] if each.shape[0] == 1 else each.sum(0)
    return total, norms


def _gram(x: Tensor, dy: Tensor) -> Tensor:
    """(B,) norms from x (B, T, K) and dy (B, T, L)."""
    if x.shape[1] == 1:
        dtype = accumulation_dtype(x.dtype)
        a, b = x[:, 0].to(dtype), dy[:, 0].to(dtype)
        single: Tensor = torch.linalg.vecdot(a, a) * torch.linalg.vecdot(b, b)
        return single
    norms = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    starts = _chunks(x.shape[0], 2 * x.shape[1] ** 2, x)
    for start in starts:
        here = slice(start, start + starts.step)
        inner, outer = (_product(t, t.transpose(1, 2)).flatten(1) for t in (x[here], dy[here]))
        # Rounding may leave a hair below zero where an example's contribution cancels.
        norms[here] = torch.linalg.vecdot(inner, outer).clamp_(min=0)
    return norms


@torch.library.custom_op("trainc::linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, form: str,
    mask: list[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias and the norms; results not asked for have no elements."""
    examples, rows = x.shape[0], math.prod(x.shape[1:-1])
    one, grad = x.reshape(examples, rows, x.shape[-1]), dy.reshape(examples, rows, dy.shape[-1])
    dx, dweight, dbias, norms = (absent(x) for _ in range(4))
    if mask[0]:
        dx = torch.mm(grad.flatten(0, 1), weight).view(x.shape)
    columns: list[Tensor] = []
    if form == "auto":
        form = "gram" if rows == 1 else choose(rows, weight.shape[1], weight.shape[0])
    if with_norms and form == "simultaneous":
        dweight, norms = _simultaneous(one, grad)
        columns.append(norms)
        dweight = dweight.to(weight.dtype) if mask[1] else absent(x)
    else:
        if mask[1]:
            dweight = torch.mm(grad.flatten(0, 1).t(), one.flatten(0, 1))
        if with_norms:
            columns.append(_gram(one, grad))
    if has_bias and (with_norms or mask[2]):
        each = grad.sum(1, dtype=accumulation_dtype(x.dtype))
        columns.append(torch.linalg.vecdot(each, each))
        dbias = each.sum(0).to(weight.dtype) if mask[2] else absent(x)
    norms = torch.stack(columns, 1) if with_norms else norms
    return dx, dweight, dbias, norms


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, form: str,
    mask: list[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if mask[0] else absent(x)
    dweight = weight.new_empty(weight.shape) if mask[1] else absent(x)
    dbias = weight.new_empty(weight.shape[:1]) if has_bias and mask[2] else absent(x)
    shape = (x.shape[0], 2 if has_bias else 1)
    norms = x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) if with_norms else absent(x)
    return dx, dweight, dbias, norms


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, form = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.form = bias is not None, form


def _differentiate(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx, dweight, dbias, norms = torch.ops.trainc.linear_backward(
        dy, x, weight, ctx.has_bias, ctx.form, list(wants[:3]), wants[3]
    )
    found = (dx, dweight, dbias, norms)
    return *(g if wanted else None for g, wanted in zip(found, wants, strict=False)), None


_forward.register_autograd(_differentiate, setup_context=_save)
