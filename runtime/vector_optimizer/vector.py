"""What these optimizers share: the parameters as one vector, and the loss and its gradient at any vector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 1e100
"""What a loss that is not finite counts as: no search goes there."""

Vector = np.ndarray[Any, np.dtype[np.float64]]


class Landscape:
    """The loss and its gradient as functions of a vector of all parameters; the last point is kept."""

    def __init__(self, parameters: list[torch.nn.Parameter], closure: Callable[[], Any]) -> None:
        self._parameters, self._closure = parameters, closure
        self.start = self._read()
        self._at: Vector | None = None
        self._loss, self._gradient = 0.0, self.start
        self.value(self.start)

    def value(self, x: Vector) -> float:
        """Return the loss at a vector; one that is not finite counts as a large one."""
        if self._at is None or not np.array_equal(x, self._at):
            if not np.array_equal(x, self.start) or self._at is not None:
                self.write(x)
            found = self._closure()
            loss = float(found.detach() if isinstance(found, Tensor) else found)
            self._loss = loss if np.isfinite(loss) else LARGE
            self._gradient = np.concatenate([_gradient(p) for p in self._parameters])
            self._at = x.copy()
        return self._loss

    def gradient(self, x: Vector) -> Vector:
        """Return the gradient at a vector."""
        self.value(x)
        return self._gradient

    def _read(self) -> Vector:
        return np.concatenate([_numbers(p) for p in self._parameters])

    @torch.no_grad()
    def write(self, x: Vector) -> None:
        """Put a vector into the parameters, rounded to their dtype."""
        begin = 0
        for parameter in self._parameters:
            part = torch.from_numpy(x[begin : begin + parameter.numel()])
            parameter.copy_(part.to(parameter.dtype).view(parameter.shape))
            begin += parameter.numel()


def _numbers(tensor: Tensor) -> Vector:
    found: Vector = tensor.detach().cpu().double().numpy().reshape(-1)  # MPS has no float64
    return found


def _gradient(parameter: torch.nn.Parameter) -> Vector:
    found = parameter.grad
    if found is None:
        return np.zeros(parameter.numel())
    return _numbers(found.to_dense() if found.is_sparse else found)


class VectorOptimizer(torch.optim.Optimizer):
    """Base: `step(closure)` moves the parameters that require a gradient by the fraction `lr` of a way to a vector.

    The state is that of the first of these parameters: arrays of all of them together, in float64.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 1.0) -> None:
        super().__init__(groups, {"lr": lr})

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Make one iteration; the closure returns the loss at the weights of now and leaves its gradient."""
        every = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        moving = [(p, lr) for p, lr in every if p.requires_grad]
        landscape = Landscape([p for p, _ in moving], closure)
        start = landscape.start
        loss = landscape.value(start)
        state = self.state[moving[0][0]]
        with np.errstate(all="ignore"):
            found = self.iterate(landscape, state)
        rates = np.concatenate([np.full(p.numel(), lr) for p, lr in moving])
        landscape.write(np.where(rates == 1, found, start + rates * (found - start)))
        return loss

    @abstractmethod
    def iterate(self, at: Landscape, state: dict[str, Any]) -> Vector:
        """Return where to go from `at.start`, and keep in `state` what the next iteration reads."""


def kept(state: dict[str, Any], name: str, shape: tuple[int, ...]) -> Vector | None:
    """Return a copy of an array of the state; None where there is none of this shape."""
    found = state.get(name)
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        return None
    return found.detach().cpu().numpy().copy()


def keep(state: dict[str, Any], name: str, value: Vector) -> None:
    """Put an array into the state."""
    state[name] = torch.from_numpy(np.ascontiguousarray(value))
