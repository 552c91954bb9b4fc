"""What an optimizer does that its clause cannot carry out, and what is behind an error of its step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter


class OptimizerProblem(ValueError):
    """An optimizer does what trainc cannot work with; `clause` is the label of its clause, `field` a field of it."""

    def __init__(self, clause: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.clause, self.field = clause, field


class NamedTensor(Protocol):
    """A parameter with its name."""

    name: str
    tensor: Parameter


def explain_failure(
    label: str, kind: str, parameters: Iterable[NamedTensor], error: Exception
) -> None:
    """Raise OptimizerProblem where an error of `step()` says what it cannot do; any other is left to the caller.

    Known reasons are a sparse gradient, gradients that keep nothing to differentiate, and no closure.
    """
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
    sparse = (p.name for p in parameters if p.tensor.grad is not None and p.tensor.grad.is_sparse)
    name = next(sparse, None)
    if name is not None and isinstance(error, RuntimeError):
        raise OptimizerProblem(
            label,
            f"`{label}` failed, and the gradient of `{name}` is sparse, because its layer was built with"
            f" `sparse=True`. torch says: {reason}. Build the layer with `sparse=False`, or train `{name}` by an"
            " `optimizer` clause of its own: torch's SparseAdam, or an optimizer that takes sparse gradients, without"
            " `weight_decay`",
        ) from error
    if "does not require grad" in str(error) or "create_graph" in str(error):
        raise OptimizerProblem(
            label,
            f"`step` of `{kind}` differentiates gradients, and those of a program keep nothing to differentiate: use an"
            f" optimizer that reads gradients alone. It said: {reason}",
            "path",
        ) from error
    if "closure" in f"{type(error).__name__} {error}".lower():
        raise OptimizerProblem(
            label,
            f"`step` of `{kind}` needs a closure, although its signature does not say so: {reason}. Write a class of"
            " your own, derived from it, whose `step(self, closure)` has no default",
            "path",
        ) from error
    if isinstance(error, AssertionError | NotImplementedError | ValueError):
        raise OptimizerProblem(
            label, f"`{label}` cannot step, because `{kind}` says: {reason}", "path"
        ) from error


def refuse_moved(
    name: str, kind: str, slots: Sequence[NamedTensor], before: Sequence[Tensor]
) -> None:
    """Raise OptimizerProblem where an optimizer moved a frozen parameter, as one state for all of them may do."""
    for slot, weight in zip(slots, before, strict=True):
        if not slot.tensor.requires_grad and not torch.equal(slot.tensor, weight):
            raise OptimizerProblem(
                name,
                f"`{slot.name}` was frozen since `trainc.compile`, but `{name}` ({kind}) moves it, as what it keeps of"
                " earlier steps is of all parameters together: let it require a gradient, or compile again while it is"
                " frozen",
            )
