"""Dispatch an operator's calls at a fraction of what `torch.library.custom_op` costs.

A custom operator checks its results for aliases and passes through four Python functions and two dispatches in every
call: microseconds that small inputs feel. Here there is one Python function per dispatch key, and the autograd key
calls the kernel itself where dispatch would find nothing in between.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from trainc.kernels.library.calls import (
    no_second_derivative,
    refuse_gradients,
    refuse_tangents,
    tensors,
)

Kernel = Callable[..., Any]
Prepare = Callable[[Sequence[Tensor]], Sequence[Tensor]]
PLAIN = frozenset((Tensor, torch.nn.Parameter))
FEW, MOST = 8, 16
"""Lists of so few tensors are not remembered, for there may be many of them, and no more than so many others are."""


def add_kernels(
    library: torch.library.Library,
    operator: Any,
    cpu: Kernel,
    cuda: Kernel,
    setup_context: Kernel | None,
    backward: Kernel | None,
) -> None:
    """Give a defined operator its kernels and its gradient, or the refusal of one."""
    below = _add_backends(library, operator, cpu, cuda)
    function = _autograd_function(operator, below, setup_context, backward)
    kernel = _autograd_kernel(operator, below, function)
    library.impl(operator, kernel, "Autograd", with_keyset=True)


def add_update_kernels(
    library: torch.library.Library,
    operator: Any,
    cpu: Kernel,
    cuda: Kernel,
    written: Sequence[int],
) -> None:
    """Give an operator without gradient its kernels; it writes to the arguments at `written`."""
    below = _add_backends(library, operator, cpu, cuda)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        refuse_gradients(operator, arguments)
        found = below(keyset, arguments)
        torch.autograd.graph.increment_version(tensors(arguments[place] for place in written))
        return found

    library.impl(operator, kernel, "Autograd", with_keyset=True)


class _Seen(NamedTuple):
    """Lists that were seen: whether they are what they were, their device, and what the kernel keeps of them."""

    unchanged: Callable[..., bool]
    device: int
    kept: dict[str, Any]


def on_lists(operator: Any, kernels: dict[str, Kernel], prepare: Prepare) -> Kernel:
    """A function that gives lists of tensors to an operator, or to its kernel for a type of device, see `register`.

    Whether lists are those of an earlier call, at the same addresses, of the same types, dtypes, shapes, strides and
    dispatch keys, is told in a sixth of a microsecond a tensor. A dispatch takes a list apart and makes another, in
    twice that. Lists that hold a tensor twice are taken for new ones.
    """
    transformed, guard = _C._are_functorch_transforms_active, _C._AutoDispatchBelowAutograd
    modes, functions = _C._len_torch_dispatch_stack, _C._len_torch_function_stack
    seen: dict[tuple[int, ...], _Seen] = {}

    def call(*lists: Sequence[Tensor]) -> Any:
        if is_compiling() or transformed() or modes() or functions():
            return operator(*map(prepare, lists))
        kernel = kernels.get(lists[0][0].device.type)
        every = [*chain.from_iterable(lists)]
        if kernel is None or len(every) <= FEW or not PLAIN.issuperset(map(type, every)):
            return operator(*map(prepare, lists))
        key = (len(lists[0]), *map(Tensor.data_ptr, every))
        known = seen.pop(key, None)
        if known is None or not known.unchanged(*every):
            devices = set(map(Tensor.get_device, every))
            if len(devices) > 1 or any(prepare(one) is not one for one in lists):
                return operator(*map(prepare, lists))
            same = TensorGuards(*every, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            known = _Seen(same.check, devices.pop(), {})
            if len(seen) >= MOST:
                seen.pop(next(iter(seen)), None)
        seen[key] = known  # behind those that were used before it
        with guard(), torch.cuda.device(known.device):
            return kernel(*lists, known.kept)

    return call


def without_autocast(kernel: Kernel) -> Kernel:
    """The kernel, with CUDA's autocast off while it runs."""
    keys = _C.DispatchKeySet(_C.DispatchKey.AutocastCUDA)

    def inside(*arguments: Any) -> Any:
        with _C._ExcludeDispatchKeyGuard(keys):
            return kernel(*arguments)

    return inside


def _add_backends(
    library: torch.library.Library, operator: Any, cpu: Kernel, cuda: Kernel
) -> Kernel:
    """Add both kernels; return a function that runs what comes after the autograd key."""
    library.impl(operator, cpu, "CPU")
    library.impl(operator, cuda, "CUDA")
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


def _autograd_kernel(operator: Any, below: Kernel, function: Any) -> Kernel:
    """The kernel of the autograd key: record the function where a gradient is wanted."""
    enabled, wanted = torch.is_grad_enabled, _C._any_requires_grad
    transformed = _C._are_functorch_transforms_active
    # What `apply` comes to without transforms: it would look at every argument for their wrappers.
    plain = super(torch.autograd.Function, function).apply

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(operator, arguments)
        if not (enabled() and wanted(*arguments)):
            return below(keyset, arguments)
        if not transformed():
            return plain(*arguments, keyset)
        # torch.func has come down to this level by now, as it does for torch's own operators.
        with enable_single_level_autograd_function():
            return plain(*arguments, keyset)

    return kernel


def _autograd_function(
    operator: Any, below: Kernel, setup_context: Kernel | None, backward: Kernel | None
) -> Any:
    """The autograd function; its last argument, the dispatch keys, gets no gradient."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs = arguments[:-1]
        output = below(arguments[-1], inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise no_second_derivative(operator)
        return *backward(ctx, *grads), None

    made = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    name = operator.name().removeprefix("trainc::")
    return type(f"{name}_gradient", (torch.autograd.Function,), made)
