"""Register operators of the `trainc` namespace: schema, kernels, fake kernel and gradient, in one call.

A new operator: `register("name", cpu=.., cuda=.., fake=.., setup_context=.., backward=..)`, with
`setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` as `torch.library.register_autograd` takes them.
`inputs` are all arguments in order, so a schema has no defaults, keyword-only arguments or lists of tensors. Results
must be fresh tensors; opcheck tests it. Without `backward`, gradients through the operator are refused with an error:
they would otherwise be taken from the arithmetic of the kernel.

An operator that writes to its arguments, or takes lists of tensors, is registered by `register_update`: it has no
gradient, and autograd learns of every tensor written to.

How a call is dispatched decides what it costs: `private_dispatch` is quick and uses private names of torch;
`public_dispatch` does the same by `torch.library` alone, where this torch lacks one of those names.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.devices import cuda_kernel

LIBRARY = torch.library.Library("trainc", "FRAGMENT")

# Every private name that private_dispatch uses.
PRIVATE_NAMES = (
    "torch._C:DispatchKey",
    "torch._C:DispatchKeySet",
    "torch._C:DispatchKeySet.raw_repr",
    "torch._C:_AutoDispatchBelowAutograd",
    "torch._C:_ExcludeDispatchKeyGuard",
    "torch._C:_after_autograd_keyset",
    "torch._C:_any_requires_grad",
    "torch._C:_are_functorch_transforms_active",
    "torch._C:_len_torch_dispatch_stack",
    "torch._C:_len_torch_function_stack",
    "torch._C._dynamo.guards:TensorGuards",
    "torch._functorch.utils:enable_single_level_autograd_function",
    "torch._ops:OpOverload.redispatch",
    "torch.autograd.forward_ad:_current_level",
)


def missing_names() -> list[str]:
    """The private names that this torch lacks."""
    missing = []
    for name in PRIVATE_NAMES:
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


_dispatch = import_module(
    f"trainc.kernels.library.{'public' if missing_names() else 'private'}_dispatch"
)


def register(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    schema: str | None = None,
) -> Any:
    """Define trainc::name; return its overload. The schema is that of `cpu` where none is given."""
    schema = schema or torch.library.infer_schema(cpu, mutates_args=())
    operator = _define(name, schema, fake)
    cuda = cuda_kernel(name, cpu, cuda)
    _dispatch.add_kernels(LIBRARY, operator, cpu, cuda, setup_context, backward)
    return operator


def register_update(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> Any:
    """Define trainc::name, which has no gradient and writes to the arguments `mutates`; return its overload.

    Call it under `torch.no_grad()`: where an argument would want a gradient, it raises RuntimeError.
    """
    operator = _define(name, torch.library.infer_schema(cpu, mutates_args=mutates), fake)
    names = list(inspect.signature(cpu).parameters)
    written = [names.index(argument) for argument in mutates]
    cuda = cuda_kernel(name, cpu, cuda)
    _dispatch.add_update_kernels(LIBRARY, operator, cpu, cuda, written)
    return operator


def on_lists(
    operator: Any,
    *,
    cuda: Callable[..., Any],
    prepare: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> Any:
    """A function that calls an operator of lists of tensors, none of them written to, below the cost of a dispatch.

    The operator's lists are what `prepare` makes of those given; it returns a list itself where there is nothing to do.
    `cuda` is its CUDA kernel and may get another argument behind the lists: a dict, the same one as long as the lists
    are of the same tensors, in which it keeps what follows from their addresses, dtypes, shapes and strides. Then its
    tensors may say that they are negated, as the imaginary part of a conjugate does. Call it under `torch.no_grad()`.
    """
    # AMD's GPUs have the operator's other kernel.
    kernels = {"cuda": cuda} if torch.version.hip is None else {}
    return _dispatch.on_lists(operator, kernels, prepare)


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    torch.library.register_fake(f"trainc::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.trainc, name).default


def register_autocast(operator: Any, kernel: Callable[..., Any]) -> None:
    """Call `kernel` instead of the operator under CUDA's autocast; inside it, autocast is off."""
    LIBRARY.impl(operator, _dispatch.without_autocast(kernel), "AutocastCUDA")
