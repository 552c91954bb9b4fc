"""The state with which a torch optimizer begins a parameter, or entries of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.torch_optimizer.named_state import NamedState
from trainc.runtime.torch_optimizer.slots import Group

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def make_missing(named: NamedState, make: Make, groups: Iterable[Group]) -> None:
    """Make the state of parameters that have a gradient and none, for an optimizer that makes it when it is built.

    Such a parameter was forgotten, and trains again; other optimizers make the state in their step.
    """
    state = named.optimizer.state
    if not named.built_with_state or all(p in state for p in named.parameters.values()):
        return
    for _, options, slots in groups:
        for tensor in (slot.tensor for slot in slots):
            if tensor.grad is None or state.get(tensor):
                continue
            if made := _alone(make, tensor, options).state.get(tensor):
                state[tensor] = made


def first_state(make: Make, values: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer keeps of a parameter with these values before a gradient tells it anything.

    It is the state after a step of its own whose gradient is zero, without weight decay: Adam's moments are 0, Rprop's
    step sizes are the rate, Adagrad's sums are their initial value. `options` are those of the parameter's group. Empty
    for an optimizer that no such step can be taken with, as one that asks for a closure.
    """
    probe = Parameter(values.detach().clone())
    plain = dict(options) | ({"weight_decay": 0.0} if "weight_decay" in options else {})
    try:
        optimizer = _alone(make, probe, plain)
        probe.grad = torch.zeros_like(probe)
        optimizer.step()
    except Exception:  # as a class may raise anything
        return {}
    return dict(optimizer.state.get(probe, {}))


def _alone(make: Make, parameter: Parameter, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer of one parameter, with these options."""
    own = {key: copy.deepcopy(value) for key, value in options.items() if key != "params"}
    return make([{"params": [parameter], **own}])
