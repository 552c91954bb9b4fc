"""Operators registered on a library, at a fraction of what `torch.library.custom_op` costs a call.

A custom operator checks its results for aliases and passes through four Python functions and two
dispatches at every call: microseconds that small inputs feel. `register` defines the same operator
(schema, kernels, fake kernel, gradient) with one Python function per dispatch key, and calls the
kernel straight from the autograd key where dispatch would find nothing in between.

A new operator: `register("name", cpu=.., cuda=.., fake=.., save=.., differentiate=..)`, with
`save(ctx, inputs, output)` and `differentiate(ctx, *grads)` as `torch.library.register_autograd`
takes them. `inputs` are all arguments in order, so the schema may have no defaults, keyword-only
arguments or lists of tensors. Results must be fresh tensors; opcheck proves it where a custom
operator would at every call. Without `differentiate`, gradients through the operator are refused
with an error: they would otherwise be taken from the kernel's own arithmetic.

An operator that writes to its arguments, or takes lists of tensors to measure them, is registered by
`register_update`: it has no gradient, and autograd learns of every tensor written to.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("trainc", "FRAGMENT")


def register(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Any:
    """Define trainc::name with the schema of `cpu`; return its overload."""
    operator, below = _defined(name, cpu, cuda, fake)
    function = _function(name, below, save, differentiate)
    LIBRARY.impl(name, _autograd(name, below, function), "Autograd", with_keyset=True)
    return operator


def register_update(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> Any:
    """Define trainc::name, without gradients, writing to the arguments `mutates`; return its overload.

    Call it under `torch.no_grad()`: where a gradient would be wanted of it, it raises RuntimeError.
    """
    operator, below = _defined(name, cpu, cuda, fake, mutates)
    names = list(inspect.signature(cpu).parameters)
    places = [names.index(argument) for argument in mutates]

    def kernel(keyset: Any, *arguments: Any) -> Any:
        written = [arguments[place] for place in places if arguments[place] is not None]
        if _C.is_grad_enabled() and _C._any_requires_grad(*_tensors(arguments)):
            raise RuntimeError(f"trainc::{name} has no gradient: call it under torch.no_grad()")
        found = below(keyset, arguments)
        torch.autograd.graph.increment_version(_tensors(written))
        return found

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return operator


def _defined(
    name: str,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> tuple[Any, Callable[..., Any]]:
    """Define the operator below autograd; return its overload and what autograd's kernel is to call."""
    schema = torch.library.infer_schema(cpu, mutates_args=mutates)
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"trainc::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.trainc, name).default
    return operator, _below_autograd(operator, cpu, cuda)


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, those in lists too."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found.extend(one for one in argument if isinstance(one, Tensor))
    return found


def register_autocast(operator: Any, kernel: Callable[..., Any]) -> None:
    """Let `kernel` answer for the operator under CUDA's autocast; inside it autocast is off."""
    keys = _C.DispatchKeySet(_C.DispatchKey.AutocastCUDA)

    def apart(*arguments: Any) -> Any:
        with _C._ExcludeDispatchKeyGuard(keys):
            return kernel(*arguments)

    LIBRARY.impl(operator._opname, apart, "AutocastCUDA")


def in_float32(tensor: Tensor) -> Tensor:
    """What autocast hands to an operation of its float32 list: float64 stays what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _below_autograd(
    operator: Any, cpu: Callable[..., Any], cuda: Callable[..., Any]
) -> Callable[..., Any]:
    """Run what comes after the autograd key: `operator` again, or the kernel it would end in."""
    after, guard = _C._after_autograd_keyset, _C._AutoDispatchBelowAutograd
    redispatch = operator.redispatch
    # No mode, subclass or transform has a key in these: the backend's own kernel is next.
    kernels = {
        _C.DispatchKeySet(key).raw_repr(): kernel
        for key, kernel in ((_C.DispatchKey.CPU, cpu), (_C.DispatchKey.CUDA, cuda))
    }

    def below(keyset: Any, arguments: Any) -> Any:
        rest = keyset & after
        with guard():
            kernel = kernels.get(rest.raw_repr())
            return redispatch(rest, *arguments) if kernel is None else kernel(*arguments)

    return below


def _autograd(name: str, below: Callable[..., Any], function: Any) -> Callable[..., Any]:
    """The kernel of the autograd key: record the function where a gradient is wanted."""
    enabled, wanted = _C.is_grad_enabled, _C._any_requires_grad
    transformed = _C._are_functorch_transforms_active
    # What `apply` comes to without transforms: it would look at every argument for their wrappers.
    plain = super(torch.autograd.Function, function).apply

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        if not (enabled() and wanted(*arguments)):
            return below(keyset, arguments)
        if not transformed():
            return plain(*arguments, keyset)
        # torch.func has come down to this level by now, as it does for torch's own operators.
        with enable_single_level_autograd_function():
            return plain(*arguments, keyset)

    return kernel


def _refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """Forward mode would find no derivative here and take it for zero."""
    if any(forward_ad.unpack_dual(one).tangent is not None for one in _tensors(arguments)):
        raise NotImplementedError(
            f"trainc::{name} has no forward-mode derivative: use backward, or torch.func.grad"
        )


def _function(
    name: str,
    below: Callable[..., Any],
    save: Callable[..., None] | None,
    differentiate: Callable[..., Any] | None,
) -> Any:
    """The autograd function; its last argument, the dispatch keys, gets no gradient."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs = arguments[:-1]
        output = below(arguments[-1], inputs)
        if save is not None:
            save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if differentiate is None:
            raise RuntimeError(
                f"trainc::{name} has no autograd formula: it is a gradient itself, "
                "and second derivatives are not available"
            )
        return *differentiate(ctx, *grads), None

    made = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_gradient", (torch.autograd.Function,), made)
