"""Learning rates, clipping and the update of any torch optimizer, with optimizer state saved by parameter name.

No policy overwrites a learning rate: the rate of a parameter is `base(clock)` times the named factors of the policies.
torch saves optimizer state by position; here it is saved and loaded under parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.held_updates import DecayForm, HeldUpdates, Stepped
from trainc.runtime.step.record import Step


@dataclass(slots=True)
class LrFactor:
    """A factor on the learning rate of one or more parameters, set by one policy; `unit` names these parameters.

    While `gate` is closed the parameters keep their rate.
    """

    policy: str
    unit: str
    factor: float = 1.0
    gate: Gate | None = None

    def at(self, clock: Clock) -> float:
        """Return the factor in the step at this clock."""
        return self.factor if self.gate is None or self.gate.fires(clock) else 1.0


@dataclass(slots=True)
class ParamSlot:
    """A parameter as the optimizer sees it: all or selected entries, its weight decay and rate factors."""

    name: str
    tensor: Parameter
    weight_decay: float
    lr_factors: tuple[LrFactor, ...] = ()

    def factor(self, clock: Clock) -> float:
        """Return the product of the factors in the step at this clock."""
        return math.prod((one.at(clock) for one in self.lr_factors), start=1.0)


def group_slots(slots: Iterable[ParamSlot]) -> list[list[ParamSlot]]:
    """Group slots by weight decay and rate factors, in order of first appearance: torch's parameter groups."""
    groups: dict[tuple[float, tuple[int, ...]], list[ParamSlot]] = {}
    for slot in slots:
        key = (slot.weight_decay, tuple(id(lr_factor) for lr_factor in slot.lr_factors))
        groups.setdefault(key, []).append(slot)
    return list(groups.values())


class OptimizerStep(Action):
    """Phase 9: call `step()` of a torch optimizer over the slots, then free the gradients.

    `make(groups)` builds the torch optimizer from parameter-group dicts, on first use: a plan needs no optimizer, and
    building one loads much of torch. Updates that a clause changes are left to `updates`, which adds them later;
    `decay_form` says how they depend on the weights, None where that is not known.
    """

    phase = Phase.OPTIMIZER

    def __init__(
        self,
        name: str,
        slots: Sequence[ParamSlot],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        decay_form: DecayForm | None = None,
        updates: HeldUpdates | None = None,
    ) -> None:
        self.name = name
        self.slots = tuple(slots)
        self.groups = group_slots(slots)
        self._make = make
        self._decay_form = decay_form
        self._updates = updates

    @cached_property
    def torch(self) -> torch.optim.Optimizer:
        """Return the torch optimizer; its groups are in the order of `groups`."""
        return self._make(
            [
                {"params": [slot.tensor for slot in group], "weight_decay": group[0].weight_decay}
                for group in self.groups
            ]
        )

    def run(self, step: Step) -> None:
        changed = frozenset() if self._updates is None else self._updates.wanted(step.clock)
        if self._updates is not None and changed:
            stepped = self._stepped(changed)
            self._updates.hold(step, self.torch.step, stepped, self._decay_form)
        else:
            self.torch.step()
        self.zero_grad()

    def _stepped(self, names: frozenset[str]) -> list[Stepped]:
        """Return those of the parameters that have a gradient, so that torch steps them."""
        return [
            Stepped(slot.name, slot.tensor, options["lr"], slot.weight_decay)
            for group, options in zip(self.groups, self.torch.param_groups, strict=True)
            for slot in group
            if slot.name in names and slot.tensor.grad is not None
        ]

    def zero_grad(self) -> None:
        self.torch.zero_grad(set_to_none=True)

    def state_of(self, name: str) -> Mapping[str, Any]:
        """Return the torch optimizer's state of a parameter, or of its trained entries; empty without one."""
        slot = self._slot(name)
        found: Mapping[str, Any] = {} if slot is None else self.torch.state.get(slot.tensor, {})
        return found

    def preconditioner(self, name: str) -> Tensor | None:
        """Return 1 / (sqrt(v_hat) + eps) from Adam's second moments so far; None without them."""
        slot, state = self._slot(name), self.state_of(name)
        if slot is None or "exp_avg_sq" not in state or "step" not in state:
            return None
        options = next(
            g for g in self.torch.param_groups if any(p is slot.tensor for p in g["params"])
        )
        beta, steps = options["betas"][1], float(state["step"])
        if not steps:
            return None
        second: Tensor = state["exp_avg_sq"] / (1 - beta**steps)
        scale: Tensor = 1 / (second.sqrt() + options["eps"])
        return scale

    def _slot(self, name: str) -> ParamSlot | None:
        return next((slot for slot in self.slots if slot.name == name), None)

    def state_dict(self) -> ActionState:
        return {
            f"{slot.name}/{key}": value
            for slot in self.slots
            for key, value in self.torch.state.get(slot.tensor, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        slots = {slot.name: slot for slot in self.slots}
        found: dict[str, dict[str, Any]] = {}
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            if name not in slots:
                raise ValueError(
                    f"{self.name}: the checkpoint has optimizer state of `{name}`, which this clause does not optimize"
                )
            found.setdefault(name, {})[key] = _on_device_of(value, slots[name])
        self.torch.state.clear()
        for name, entries in found.items():
            self.torch.state[slots[name].tensor] = entries


def _on_device_of(value: Any, slot: ParamSlot) -> Any:
    """Return saved state on the parameter's device; step counters stay on the CPU, where torch keeps them."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0:
        return value.clone()
    if value.shape != slot.tensor.shape:
        raise ValueError(
            f"`{slot.name}` has shape {tuple(slot.tensor.shape)}, but its saved optimizer"
            f" state has shape {tuple(value.shape)}"
        )
    return value.to(slot.tensor.device, copy=True)


class Rates(Action):
    """Phase 2: set every group's learning rate to the schedule's value times the factors of the policies."""

    phase = Phase.RATES

    def __init__(self, name: str, base: Callable[[Clock], float], optimizer: OptimizerStep) -> None:
        self.name = name
        self.base = base
        self.optimizer = optimizer
        self.lowest, self.highest = math.inf, -math.inf

    def run(self, step: Step) -> None:
        base = self.base(step.clock)
        if not math.isfinite(base):
            raise ValueError(
                f"{self.name}: the learning rate is {base}, because a signal in its schedule is not measured yet"
            )
        rates = []
        groups = self.optimizer.torch.param_groups
        for ours, theirs in zip(self.optimizer.groups, groups, strict=True):
            theirs["lr"] = base * ours[0].factor(step.clock)
            rates.append(theirs["lr"])
        low, high = min(rates), max(rates)
        step.signals["lr"] = base
        step.metrics["lr_min"] = min(low, step.metrics.get("lr_min", low))
        step.metrics["lr_max"] = max(high, step.metrics.get("lr_max", high))
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)

    def summary(self) -> str | None:
        if self.lowest > self.highest:
            return None
        groups = len(self.optimizer.groups)
        return (
            f"{self.name}: learning rates from {self.lowest:.3g} to {self.highest:.3g}"
            f" in {groups} parameter group{'s' * (groups != 1)}"
        )


class Clip(Action):
    """Phase 8, last: clip all gradients to a global L2 norm of at most `limit`."""

    phase = Phase.GRADIENTS

    def __init__(self, name: str, limit: float, slots: Sequence[ParamSlot]) -> None:
        self.name = name
        self.limit = limit
        self.slots = tuple(slots)
        self.steps = self.clipped = 0

    def run(self, step: Step) -> None:
        norm: Tensor = clip_grad_norm_([slot.tensor for slot in self.slots], self.limit)
        value = float(norm)
        step.metrics["gradient_norm"] = value
        self.steps += 1
        self.clipped += value > self.limit

    def summary(self) -> str | None:
        if not self.steps:
            return None
        return f"{self.name}: clipped {self.clipped} of {self.steps} steps to norm {self.limit:g}"
