"""Hold back what an optimizer would add to the weights, so that it can be changed first.

The difference of the weights after and before a step is rounded as coarsely as the weights are: in float32 each of its
entries is wrong by up to 6e-8 times the weight, often a thousandth of the update itself. So the optimizer steps from
zero: its parameters are zero while it steps, and hold nothing but its update afterwards, rounded as the update is
(6e-8 of itself). That is exact for an optimizer that uses the weights for nothing but weight decay; the decay is then
added here. Of any other optimizer the difference of the weights is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.step.updates import Update, UpdateTransform

DecayForm = Literal["decoupled", "coupled"]
"""How an optimizer decays weights, where its update depends on them by the decay alone: `decoupled` shrinks them by
`rate * decay`, `coupled` adds `decay * weights` to the gradient."""


@dataclass(slots=True)
class Stepped:
    """A parameter as its optimizer is about to step it: its tensor with a gradient, its rate and weight decay."""

    name: str
    tensor: Parameter
    lr: float
    weight_decay: float


class HeldUpdates(Action):
    """Phase 10, after the transforms: adds the updates that optimizers left to the weights; they take `size` bytes.

    `index` says which entries of a parameter a mask has selected, None for all.
    """

    phase = Phase.DELTAS
    name = "held updates"

    def __init__(
        self,
        transforms: Sequence[UpdateTransform],
        size: int = 0,
        index: Callable[[str], Tensor | None] = lambda name: None,
    ) -> None:
        self.transforms = tuple(transforms)
        self._size, self._index = size, index
        self._held: dict[str, Update] = {}
        self._step: Step | None = None
        self._noted = False
        for transform in self.transforms:
            transform.held = self._held

    def wanted(self, clock: Clock) -> frozenset[str]:
        """Return the parameters whose updates are changed in this step; none while all gates are closed."""
        now = (t for t in self.transforms if t.gate is None or t.gate.fires(clock))
        return frozenset(name for transform in now for name in transform.parameters)

    def hold(
        self,
        step: Step,
        optimizer: Callable[[], object],
        stepped: Sequence[Stepped],
        form: DecayForm | None,
    ) -> None:
        """Call `optimizer`, and keep what it would have added to these parameters, which stay as they are."""
        if self._step is not step:  # an error may have left those of another step
            self._held.clear()
            self._step = step
        with torch.no_grad():
            if form is None:
                self._note_rounding(step, stepped)
                found = _differences(optimizer, stepped)
            else:
                found = _steps_from_zero(optimizer, stepped, form)
        for one, change in zip(stepped, found, strict=True):
            known = one.name, one.tensor.detach(), change, one.lr
            self._held[one.name] = Update(*known, self._index(one.name))

    def memory(self) -> int:
        return self._size

    def _note_rounding(self, step: Step, stepped: Sequence[Stepped]) -> None:
        """Say once how coarse the differences of rounded weights are."""
        rounded = [one.tensor.dtype for one in stepped if one.tensor.dtype != torch.float64]
        if rounded and not self._noted:
            self._noted = True
            half = torch.finfo(rounded[0]).eps / 2
            step.notes.append(
                f"{self.transforms[0].name}: this optimizer does not say how its updates depend on the weights, so they"
                f" are differences of rounded weights, wrong by up to {half:.1g} times each weight: use an optimizer"
                " that has a name in trainc for exact ones"
            )

    def run(self, step: Step) -> None:
        with torch.no_grad():
            for update in self._held.values():
                update.before.add_(update.change)
        self._held.clear()
        self._step = None


def _steps_from_zero(
    optimizer: Callable[[], object], stepped: Sequence[Stepped], form: DecayForm
) -> list[Tensor]:
    """Return what the optimizer adds, by a step in which the parameters are zero."""
    if form == "coupled":
        for one in stepped:
            if one.weight_decay and one.tensor.grad is not None:
                one.tensor.grad.add_(one.tensor, alpha=one.weight_decay)
    weights = [_take_weights(one.tensor) for one in stepped]
    changes = []
    try:
        optimizer()
    finally:
        for one, weight in zip(stepped, weights, strict=True):
            changes.append(_put_weights(one.tensor, weight))
    if form == "decoupled":
        for one, weight, change in zip(stepped, weights, changes, strict=True):
            if one.weight_decay:
                change.add_(weight, alpha=-one.lr * one.weight_decay)
    return changes


def _take_weights(parameter: Parameter) -> Tensor:
    """Set a parameter to zero, and return its weights."""
    if is_sharded(parameter):  # its shard is not in `data`
        weight = parameter.detach().clone()
        parameter.zero_()
        return weight
    weight = parameter.data
    parameter.data = torch.zeros_like(weight)
    return weight


def _put_weights(parameter: Parameter, weight: Tensor) -> Tensor:
    """Give a parameter its weights back, and return what it was meanwhile."""
    if is_sharded(parameter):
        found = parameter.detach().clone()
        parameter.copy_(weight)
        return found
    found = parameter.data
    parameter.data = weight
    return found


def _differences(optimizer: Callable[[], object], stepped: Sequence[Stepped]) -> list[Tensor]:
    """Return what the optimizer adds, as the difference of the weights after and before its step."""
    before = [one.tensor.detach().clone() for one in stepped]
    optimizer()
    changes = []
    for one, weight in zip(stepped, before, strict=True):
        changes.append(one.tensor - weight)
        one.tensor.copy_(weight)
    return changes
