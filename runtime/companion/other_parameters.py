"""Run a module once with other parameters, which are functions of its own, and leave its own untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def other_parameters(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module have functions of its parameters in their place, for the passes of this block.

    `module` is a copy of the model, such as a companion's, whose parameters may be the model's own tensors: no tensor
    is written to, and what the module held is put back however the block ends, so that it is the same bit for bit.
    `change` is given a parameter, detached, and returns a new tensor; each tensor is changed once, wherever it is used.
    The changed ones are held together, which takes as much memory as the parameters, and require no gradient.
    """
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    changed: dict[int, nn.Parameter] = {}
    try:
        with torch.no_grad():
            for owner, name, parameter in places:
                if id(parameter) not in changed:
                    changed[id(parameter)] = nn.Parameter(change(parameter.detach()), False)
                setattr(owner, name, changed[id(parameter)])  # recurrent layers have lists of them
        yield
    finally:
        for owner, name, parameter in places:
            setattr(owner, name, parameter)
