"""Make the operators of a norm from one description: the norm alone, and the norm of x plus a residual.

LayerNorm and RMSNorm differ in their parameters, in the statistics of a row and in arithmetic. How arguments are laid
out, what the fake kernels return, what forward saves and which gradients there are is the same:

  forward   x, (residual,) normalized_shape, *parameters, probe, eps, *options -> (total,) y, *statistics
  backward  (dtotal,) dy, x or total, normalized_shape, *statistics, *parameters, *options, output_mask, with_norms
            -> dx, a gradient for each parameter, norms
  backward_of_sum  the same for two or three gradients of y, which stand behind one another

A norm has as many statistics as parameters, and its norms a column for each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED, absent, in_float32, lazy
from trainc.kernels.library.register import register, register_autocast
from trainc.kernels.norm.rows import statistic_shape

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Norm:
    """What distinguishes one norm from another."""

    name: str
    parameters: tuple[str, ...]
    statistics: tuple[str, ...]
    options: tuple[str, ...]  # as they stand in a schema
    check: Kernel  # of x and what follows it in forward's arguments
    dtypes: Kernel  # of the same: the dtypes of y and of the statistics
    autocasts: Kernel  # of the options: whether torch's autocast has the rule "in float32" for it
    forward: Kernel
    backward: Kernel  # with_norms is True where it is left out
    # ATen's own, with backward's arguments but for with_norms. It gives the gradients of the norm alone without a
    # probe. With one, forward's statistics are others, so that norms are made whether or not they are wanted.
    native_backward: Kernel | None = None


class NormOperator:
    """trainc::<norm> and its backward, or with a residual trainc::add_<norm> and its backward."""

    def __init__(self, norm: Norm, residual: bool = False) -> None:
        self.norm, self.residual = norm, residual
        self.native = None if residual else norm.native_backward
        self.eager_forward = _on_sum(norm.forward) if residual else norm.forward
        self.eager_backward = _to_sum(norm.backward) if residual else norm.backward
        self.cuda_forward = lazy("norm.triton_norm_launch", "operator_forward", self)
        self.cuda_backward = lazy("norm.triton_norm_launch", "operator_backward", self)
        name = f"add_{norm.name}" if residual else norm.name
        forward, backward = self._schemas()
        self.backward_op = register(
            f"{name}_backward",
            cpu=self.eager_backward,
            cuda=self.cuda_backward,
            fake=_fake_backward(norm, residual),
            schema=backward,
        )
        dy = "Tensor? dtotal, Tensor dy" if residual else "Tensor dy"
        self.backward_of_sum_op = register(
            f"{name}_backward_of_sum",
            cpu=_of_sum(self.eager_backward, residual),
            cuda=lazy("norm.triton_norm_launch", "operator_backward_of_sum", self),
            fake=_of_sum(_fake_backward(norm, residual), residual),
            schema=backward.replace(dy, f"{dy}, Tensor second, Tensor? third", 1),
        )
        setup_context, differentiate = _gradients(self)
        self.forward_op = register(
            name,
            cpu=self.eager_forward,
            cuda=self.cuda_forward,
            fake=_fake_forward(norm, residual),
            setup_context=setup_context,
            backward=differentiate,
            schema=forward,
        )
        self.autocast = _autocast(self)
        register_autocast(self.forward_op, self.autocast)

    def _schemas(self) -> tuple[str, str]:
        norm, residual = self.norm, self.residual
        statistics = [f"Tensor {name}" for name in norm.statistics]
        parameters = [f"Tensor? {name}" for name in norm.parameters]
        x = ["Tensor x", "Tensor residual"] if residual else ["Tensor x"]
        shape, probe, eps = "SymInt[] normalized_shape", "Tensor? probe", "float eps"
        forward = [*x, shape, *parameters, probe, eps, *norm.options]
        dy = ["Tensor? dtotal", "Tensor dy", "Tensor total"] if residual else ["Tensor dy", *x]
        masks = ["bool[] output_mask", *([] if self.native else ["bool with_norms"])]
        backward = [*dy, shape, *statistics, *parameters, *norm.options, *masks]
        results = 1 + residual + len(statistics), 2 + len(parameters)
        made = [
            f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * count)})"
            for arguments, count in zip((forward, backward), results, strict=True)
        ]
        return made[0], made[1]


def check_pair(x: Tensor, residual: Tensor) -> None:
    """Reject summands of different shapes: nothing is broadcast."""
    if x.shape != residual.shape:  # traced by dynamo, which takes no message that is made on demand
        raise RuntimeError(
            f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have the same shape"
        )


def empty_total(x: Tensor, residual: Tensor) -> Tensor:
    """An unwritten tensor like the sum."""
    check_pair(x, residual)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _on_sum(forward: Kernel) -> Kernel:
    """The forward kernel of a norm, on x + residual."""

    def eager_forward(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        check_pair(x, residual)
        total = (x + residual).contiguous()
        return total, *forward(total, *rest)

    return eager_forward


def _to_sum(backward: Kernel) -> Kernel:
    """The backward kernel of a norm, with the gradient of the sum added to that of its input."""

    def eager_backward(dtotal: Tensor | None, dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dx, *others = backward(dy, *rest)
        if dtotal is not None and dx.numel():
            dx = dx.add_(dtotal)
        return dx, *others

    return eager_backward


def _of_sum(backward: Kernel, residual: bool) -> Kernel:
    """A backward kernel for two or three gradients of y, added as autograd adds them: two, then the third."""

    def of_sum(*arguments: Any) -> tuple[Tensor, ...]:
        before, (dy, second, third, *rest) = arguments[:residual], arguments[residual:]
        dy = dy + second if third is None else dy + second + third
        return backward(*before, dy, *rest)  # type: ignore[no-any-return]

    return of_sum


def backward_arguments(norm: Norm, rest: Sequence[Any]) -> tuple[Any, Any, Any, Any, bool]:
    """Statistics, parameters, options, output_mask and with_norms out of what follows normalized_shape."""
    count = len(norm.parameters)
    last = 2 * count + len(norm.options)
    mask, with_norms = (*rest[last:], True)[:2]
    return rest[:count], rest[count : 2 * count], rest[2 * count : last], mask, with_norms


def _fake_forward(norm: Norm, residual: bool) -> Kernel:
    def alone(x: Tensor, normalized_shape: Sequence[int], *rest: Any) -> tuple[Tensor, ...]:
        norm.check(x, normalized_shape, *rest)
        dtype, statistics = norm.dtypes(x, *rest)
        shape = statistic_shape(x, normalized_shape)
        kept = (x.new_empty(shape, dtype=statistics) for _ in norm.statistics)
        return x.new_empty(x.shape, dtype=dtype), *kept

    def on_sum(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        total = empty_total(x, residual)
        return total, *alone(total, *rest)

    return on_sum if residual else alone


def _fake_backward(norm: Norm, residual: bool) -> Kernel:
    def alone(dy: Tensor, x: Tensor, _: Sequence[int], *rest: Any) -> tuple[Tensor, ...]:
        statistics, parameters, _, mask, with_norms = backward_arguments(norm, rest)
        gradients = (
            t.new_empty(t.shape) if t is not None and wanted else absent(x)
            for t, wanted in zip((x, *parameters), mask, strict=True)
        )
        rstd = statistics[-1]
        norms = rstd.new_empty((x.shape[0], len(parameters))) if with_norms else absent(rstd)
        return *gradients, norms

    def to_sum(dtotal: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return alone(*rest)

    return to_sum if residual else alone


def _gradients(operator: NormOperator) -> tuple[Kernel, Kernel]:
    """The operator's `setup_context` and `backward`."""
    norm, residual, native = operator.norm, operator.residual, operator.native
    backward_op, always = operator.backward_op, norm.native_backward is not None
    first, count = 1 + residual, len(norm.parameters)  # the summands, then normalized_shape
    affine, probe = slice(first + 1, first + 1 + count), first + 1 + count
    statistics, options = slice(-count, None), slice(probe + 2, None)
    # eps and the options have no gradient.
    no_options = (None,) * (1 + len(norm.options))

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        kept = output[statistics]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0] if residual else inputs[0], *kept, *inputs[affine])
        ctx.normalized_shape, ctx.options = list(inputs[first]), inputs[options]
        ctx.probed = inputs[probe] is not None
        if residual:
            ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)

    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        dtotal, dy = grads[:2] if residual else (None, grads[0])
        wants = ctx.needs_input_grad
        wanted = wants[affine]
        dx, found, norms = dtotal, [None] * count, None
        if dy is not None:
            x, *kept = ctx.saved_tensors
            mask = [wants[0] or (residual and wants[1]), *wanted]
            with_norms = ctx.probed and (always or wants[probe])
            arguments = (dy, x, ctx.normalized_shape, *kept, *ctx.options, mask)
            if residual:
                dx, *found, norms = backward_op(dtotal, *arguments, with_norms)
            elif native is None:
                dx, *found, norms = backward_op(*arguments, with_norms)
            elif with_norms:
                dx, *found, norms = backward_op(*arguments)
            else:
                dx, *found = native(*arguments)
            if False in wanted:
                found = [g if w else None for g, w in zip(found, wanted, strict=True)]
        norms = norms if wants[probe] else None
        if residual:
            return *_to_summands(dx, wants, ctx.dtypes), None, *found, norms, *no_options
        return dx if wants[0] else None, None, *found, norms, *no_options

    return setup_context, backward


def _to_summands(
    gradient: Tensor | None, wanted: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """The gradient of a sum for x and for residual, where wanted."""
    return [
        gradient.to(dtype) if wants and gradient is not None else None
        for wants, dtype in zip(wanted[:2], dtypes, strict=True)
    ]


def _autocast(operator: NormOperator) -> Kernel:
    """What CUDA's autocast makes of the composition: a sum in the promoted dtype, a norm in float32.

    A float32 norm of a 16-bit sum is two operators, for the fused one gives both one dtype. A residual stream in
    float32, the usual one, stays fused. Norms that torch's autocast leaves alone are left alone here too.
    """
    norm, count = operator.norm, len(operator.norm.parameters)
    alone = (
        operator.forward_op
        if not operator.residual
        else getattr(torch.ops.trainc, norm.name).default
    )

    def wide(x: Tensor, normalized_shape: Sequence[int], *rest: Any) -> Any:
        if norm.autocasts(*rest[count + 2 :]):
            parameters = (None if p is None else in_float32(p) for p in rest[:count])
            x, rest = in_float32(x), (*parameters, *rest[count:])
        return alone(x, normalized_shape, *rest)

    def on_sum(x: Tensor, residual: Tensor, normalized_shape: Sequence[int], *rest: Any) -> Any:
        reduced = torch.promote_types(x.dtype, residual.dtype) in REDUCED
        if not (reduced and norm.autocasts(*rest[count + 2 :])):
            return operator.forward_op(x, residual, normalized_shape, *rest)
        total = x + residual
        return total, *wide(total, normalized_shape, *rest)

    return on_sum if operator.residual else wide
