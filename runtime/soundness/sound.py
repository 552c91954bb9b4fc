"""The one definition of sound: of a step, and of what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.soundness.gradient_norm import GradientNorms


def unsound_step(loss: float, gradient_norm: float = 0.0) -> str | None:
    """Return what of a step is not finite, such as `the loss is nan`; None for a sound step.

    A step is sound when its loss and the norm of its gradient over the whole model are finite.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient norm is {gradient_norm}, although the loss is {loss:.6g}"
    return None


def first_nan(values: Iterable[tuple[str, Any]]) -> str | None:
    """Return the name of the first number, or tensor with an entry, that is NaN; infinite ones are not looked for."""
    tensors: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, value in values:
        if isinstance(value, Tensor):
            for _, one in _floating(name, value):
                tensors.setdefault(one.device, []).append((name, one.isnan().any()))
        elif isinstance(value, float | complex) and value != value:
            return name
    for found in tensors.values():
        are_nan = torch.stack([one for _, one in found]).tolist()
        if any(are_nan):
            return found[are_nan.index(True)][0]
    return None


def unsound_tensor(tensors: Iterable[tuple[str, Any]]) -> str | None:
    """Return the name of the first tensor that has an entry which is NaN or infinite; None where all are finite.

    What is no tensor of floating point counts as finite; lists and tuples are looked into.
    """
    found = [pair for name, value in tensors for pair in _floating(name, value)]
    norms = GradientNorms.of([], [tensor for _, tensor in found])
    norms.keep(float(one) for one in norms.numbers)
    pairs = zip(found, norms.values, strict=True)
    return next((name for (name, _), value in pairs if not math.isfinite(value)), None)


def _floating(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _floating(name, one)
    elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        given: Any = value
        yield name, (given.to_local() if is_sharded(value) else value).detach()


def name_unsound(loss: float) -> str:
    """Return what the records of a run call a step that is not sound, by its loss."""
    return "non-finite-gradient" if math.isfinite(loss) else "non-finite-loss"
