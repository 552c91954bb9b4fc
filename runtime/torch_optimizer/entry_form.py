"""What a class of torch.optim keeps of one parameter, found by a step of a small one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.storage.form import Form, StateProblem, shown
from trainc.runtime.torch_optimizer.named_state import NamedState, Options

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

_SQUARES = (
    "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance", "row_var", "col_var", "exp_inf",
    "step", "step_size",
)  # fmt: skip
"""What torch's optimizers call counters and averages of squares, which are never negative."""


@dataclass(frozen=True)
class EntryForm(Form):
    """One entry of a parameter's state: a tensor of a shape and a dtype, or a value of the kind of another."""

    like: Any
    shape: torch.Size
    squares: bool

    any_length: bool = False

    def of_any_length(self) -> EntryForm:
        """Return the form in which a vector may have any length, as one of other masked entries has."""
        return replace(self, any_length=True)

    def fits(self, value: Any, partial: bool) -> bool:
        if not isinstance(self.like, Tensor):
            return alike(value, self.like)
        if not isinstance(value, Tensor) or value.dtype != self.like.dtype:
            return False
        if self.any_length and len(self.shape) == 1:
            return value.dim() == 1
        return value.shape == self.shape

    def __str__(self) -> str:
        if not isinstance(self.like, Tensor):
            return f"a value such as {self.like!r}"
        return f"a tensor {str(self.like.dtype).removeprefix('torch.')}{list(self.shape)}"

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        super().check(value, path, partial)
        if self.squares and isinstance(value, Tensor) and _negative(value):
            raise StateProblem(path, "no negative entries", f"{shown(value)} with one")


class EntryForms:
    """The forms of what an optimizer keeps of its parameters, where its class is one of torch.optim."""

    def __init__(self, named: NamedState, make: Make) -> None:
        self.named, self.make = named, make

    def of(self, name: str) -> Mapping[str, EntryForm] | None:
        """Return the forms of all entries of a parameter; None where they cannot be known."""
        parameter = self.named.parameters[name]
        if not of_torch(type(self.named.optimizer)) or (found := self._example(parameter)) is None:
            return None
        return {
            key: EntryForm(
                like,
                _scaled(like.shape, parameter.shape) if isinstance(like, Tensor) else torch.Size(),
                key in _SQUARES,
            )
            for key, like in found.items()
        }

    def fitting(self, name: str, own: Options) -> Options | None:
        """Return the entries of a parameter that the class keeps; None where one is missing or does not fit."""
        if (forms := self.of(name)) is None:
            return own
        if not all(key in own and form.fits(own[key], False) for key, form in forms.items()):
            return None
        return {key: own[key] for key in forms}

    def _example(self, parameter: Tensor) -> Options | None:
        """Return what the class keeps of a parameter with 2 entries on each axis; None where it cannot be known."""
        probe = Parameter(
            torch.zeros([2] * parameter.dim(), dtype=parameter.dtype, device=parameter.device)
        )
        probe.grad = torch.ones_like(probe)
        try:
            optimizer = self.make([{"params": [probe]}])
            optimizer.step()
        except Exception:  # such as one that asks for a closure, or sparse gradients
            return None
        return dict(optimizer.state.get(probe, {}))


def of_torch(kind: type) -> bool:
    """Say whether a class is one of torch's own optimizers."""
    return f"{kind.__module__}.".startswith("torch.optim.")


def alike(value: Any, like: Any) -> bool:
    """Say whether a value is of the kind of another: both numbers, both flags, tuples of as many, or the same type."""
    if isinstance(like, Tensor):
        return isinstance(value, Tensor | float | int)
    if isinstance(value, Tensor):
        return isinstance(like, float) and value.numel() == 1
    if isinstance(like, bool) or isinstance(value, bool):
        return like is None or value is None or isinstance(value, bool) == isinstance(like, bool)
    if isinstance(like, int | float):
        return isinstance(value, int | float)
    if isinstance(like, list | tuple) and isinstance(value, list | tuple):
        return len(value) == len(like) and all(map(alike, value, like))
    return like is None or value is None or isinstance(value, type(like))


def _scaled(example: Sequence[int], shape: torch.Size) -> torch.Size:
    """Return the shape of an entry for a parameter, from that for one with 2 entries on each axis."""
    if len(example) != len(shape):
        return torch.Size(example)
    return torch.Size(
        real if size == 2 else size for size, real in zip(example, shape, strict=True)
    )


def _negative(value: Tensor) -> bool:
    given: Any = value
    own = given.to_local() if hasattr(value, "device_mesh") else value
    return not own.is_sparse and not own.is_complex() and bool((own < 0).any())
