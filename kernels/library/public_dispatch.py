"""Dispatch an operator's calls by the public `torch.library`, for a torch without the names of `private_dispatch`.

Results are the same; a call costs more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from trainc.kernels.library.calls import (
    no_second_derivative,
    refuse_gradients,
    refuse_tangents,
    tensors,
)

Kernel = Callable[..., Any]
Prepare = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def add_kernels(
    library: torch.library.Library,
    operator: Any,
    cpu: Kernel,
    cuda: Kernel,
    setup_context: Kernel | None,
    backward: Kernel | None,
) -> None:
    """Give a defined operator its kernels and its gradient, or the refusal of one."""

    def refused(ctx: Any, *grads: Any) -> Any:
        raise no_second_derivative(operator)

    def without_tangents(kernel: Kernel) -> Kernel:
        def checked(*arguments: Any) -> Any:
            refuse_tangents(operator, arguments)
            return kernel(*arguments)

        return checked

    library.impl(operator, without_tangents(cpu), "CPU")
    library.impl(operator, without_tangents(cuda), "CUDA")
    torch.library.register_autograd(
        operator, backward or refused, setup_context=setup_context, lib=library
    )


def add_update_kernels(
    library: torch.library.Library,
    operator: Any,
    cpu: Kernel,
    cuda: Kernel,
    written: Sequence[int],
) -> None:
    """Give an operator without gradient its kernels; it writes to the arguments at `written`."""

    def without_gradients(kernel: Kernel) -> Kernel:
        def checked(*arguments: Any) -> Any:
            refuse_gradients(operator, arguments)
            found = kernel(*arguments)
            increment_version(tensors(arguments[place] for place in written))
            return found

        return checked

    library.impl(operator, without_gradients(cpu), "CPU")
    library.impl(operator, without_gradients(cuda), "CUDA")


def on_lists(operator: Any, kernels: dict[str, Kernel], prepare: Prepare) -> Kernel:
    """A function that gives lists of tensors to an operator."""

    def call(*lists: Sequence[Tensor]) -> Any:
        return operator(*map(prepare, lists))

    return call


def without_autocast(kernel: Kernel) -> Kernel:
    """The kernel, with CUDA's autocast off while it runs."""

    def inside(*arguments: Any) -> Any:
        enabled = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", False)
        try:
            return kernel(*arguments)
        finally:
            torch.set_autocast_enabled("cuda", enabled)

    return inside
