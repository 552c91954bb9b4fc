"""The tensors among a call's arguments, and the errors for derivatives that an operator does not have."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, those in lists too."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found.extend(one for one in argument if isinstance(one, Tensor))
    return found


def refuse_tangents(operator: Any, arguments: Iterable[Any]) -> None:
    """Raise NotImplementedError in forward mode, where the missing derivative would count as zero."""
    if any(forward_ad.unpack_dual(one).tangent is not None for one in tensors(arguments)):
        raise NotImplementedError(
            f"{operator.name()} has no forward-mode derivative: use backward, or torch.func.grad"
        )


def refuse_gradients(operator: Any, arguments: Iterable[Any]) -> None:
    """Raise RuntimeError where an argument requires a gradient and the operator has none."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors(arguments)):
        raise RuntimeError(f"{operator.name()} has no gradient: call it under torch.no_grad()")


def no_second_derivative(operator: Any) -> RuntimeError:
    """The error of a backward pass through an operator that has no autograd formula."""
    return RuntimeError(
        f"{operator.name()} has no autograd formula: it is a gradient itself, "
        "and second derivatives are not available"
    )
