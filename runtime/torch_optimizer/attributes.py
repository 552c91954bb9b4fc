"""What an optimizer keeps in numbers and tensors of its own, beside the state that its `state_dict` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

ATTRIBUTES = "(attributes)"
"""The record of attributes beside an optimizer's state."""
_OF_TORCH = {"_warned_capturable_if_run_uncaptured", "_opt_called"}


class Attributes:
    """The numbers and tensors among the attributes of an optimizer, and which have changed since it was built.

    A class whose `step` counts in an attribute, such as `self.k += 1`, would go on from 0 after a resume.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._own = not type(optimizer).__module__.startswith("torch.optim")
        self._made = {name: (value, _version(value)) for name, value in self._found()}

    def _found(self) -> list[tuple[str, Any]]:
        if not self._own:  # torch's own classes keep nothing there
            return []
        pairs = [(n, v) for n, v in vars(self._optimizer).items() if n not in _OF_TORCH]
        return [(name, value) for name, value in pairs if _is_plain(value)]

    def changed(self) -> dict[str, Any]:
        """Return those that have another value than when the optimizer was built."""
        return {name: value for name, value in self._found() if self._differs(name, value)}

    def _differs(self, name: str, value: Any) -> bool:
        if name not in self._made:
            return True
        made, version = self._made[name]
        if isinstance(value, Tensor):
            return value is not made or value._version != version
        both_nan = value != value and made != made
        return type(value) is not type(made) or not (value == made or both_nan)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Set attributes to saved values."""
        for name, value in saved.items():
            before = getattr(self._optimizer, name, None)
            if isinstance(before, Tensor) and isinstance(value, Tensor):
                value = value.to(before.device)
            setattr(self._optimizer, name, value)


def _is_plain(value: object) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, Parameter)
    return value is None or type(value) in (bool, int, float)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0
