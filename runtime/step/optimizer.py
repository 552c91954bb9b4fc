"""The optimizer's part of a step: rates, clipping and the update of any torch optimizer, with state kept by name.

Nobody writes a learning rate destructively: the rate of a parameter is `base(clock)` times the named factors that
policies keep for it. torch's own optimizer state is positional; here it is saved and loaded under parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, Phase, State

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step


@dataclass(slots=True)
class LrFactor:
    """A named multiplicative factor on the rate of one or more parameters, owned by one policy."""

    policy: str
    unit: str
    factor: float = 1.0


@dataclass(slots=True)
class ParamSlot:
    """A parameter as the optimizer sees it: what it updates (the whole, or selected entries), and its knobs."""

    name: str
    tensor: Parameter
    weight_decay: float
    lr_factors: tuple[LrFactor, ...] = ()

    @property
    def factor(self) -> float:
        product = 1.0
        for lr_factor in self.lr_factors:
            product *= lr_factor.factor
        return product


@dataclass(slots=True)
class Group:
    """Slots that always share rate and decay: one torch parameter group."""

    weight_decay: float
    lr_factors: tuple[LrFactor, ...]
    slots: list[ParamSlot] = field(default_factory=list)


def group(slots: Iterable[ParamSlot]) -> list[Group]:
    """Collect slots with the same decay and the same factors, in order of first appearance."""
    groups: dict[tuple[float, tuple[int, ...]], Group] = {}
    for slot in slots:
        key = (slot.weight_decay, tuple(id(lr_factor) for lr_factor in slot.lr_factors))
        groups.setdefault(key, Group(slot.weight_decay, slot.lr_factors)).slots.append(slot)
    return list(groups.values())


class OptimizerStep(Action):
    """Phase 9: `step()` of a torch optimizer over the slots, then free the gradients.

    `make(groups)` builds the torch optimizer from parameter-group dicts, on first use: a plan needs none, and
    building one loads much of torch.
    """

    phase = Phase.OPTIMIZER

    def __init__(
        self,
        name: str,
        slots: Sequence[ParamSlot],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        self.name = name
        self.slots = tuple(slots)
        self.groups = group(slots)
        self._make = make

    @cached_property
    def torch(self) -> torch.optim.Optimizer:
        """The torch optimizer; its groups are in the order of `groups`."""
        return self._make(
            [
                {"params": [s.tensor for s in g.slots], "weight_decay": g.weight_decay}
                for g in self.groups
            ]
        )

    def run(self, step: Step) -> None:
        self.torch.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.torch.zero_grad(set_to_none=True)

    def preconditioner(self, name: str) -> Tensor | None:
        """Return 1 / (sqrt(v_hat) + eps) of Adam's second moments so far; None without them."""
        slot = next((slot for slot in self.slots if slot.name == name), None)
        state = {} if slot is None else self.torch.state.get(slot.tensor, {})
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

    def state_dict(self) -> State:
        out: State = {}
        for slot in self.slots:
            for key, value in self.torch.state.get(slot.tensor, {}).items():
                out[f"{slot.name}/{key}"] = value
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        slots = {slot.name: slot for slot in self.slots}
        found: dict[str, dict[str, Any]] = {}
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            if name not in slots:
                raise ValueError(
                    f"{self.name}: the checkpoint has optimizer state of `{name}`, which is not optimized here"
                )
            found.setdefault(name, {})[key] = _fitted(value, slots[name])
        self.torch.state.clear()
        for name, entries in found.items():
            self.torch.state[slots[name].tensor] = entries


def _fitted(value: Any, slot: ParamSlot) -> Any:
    """Return saved state on the parameter's device; counters stay where torch keeps them, on the CPU."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0:
        return value.clone()
    if value.shape != slot.tensor.shape:
        raise ValueError(
            f"`{slot.name}` has shape {tuple(slot.tensor.shape)}, its saved state {tuple(value.shape)}"
        )
    return value.to(slot.tensor.device, copy=True)


class Rates(Action):
    """Phase 2: every group's rate is the schedule's value now, times the policies' factors."""

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
                f"{self.name}: the rate is {base}; a signal it depends on was not measured yet"
            )
        rates = []
        for ours, theirs in zip(
            self.optimizer.groups, self.optimizer.torch.param_groups, strict=True
        ):
            theirs["lr"] = base * ours.slots[0].factor
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
            f"{self.name}: rates from {self.lowest:.3g} to {self.highest:.3g} over {groups} groups"
        )


class Clip(Action):
    """Phase 8, last: scale all gradients so that their global L2 norm is at most `limit`."""

    phase = Phase.GRADIENTS

    def __init__(self, name: str, limit: float, slots: Sequence[ParamSlot]) -> None:
        self.name = name
        self.limit = limit
        self.slots = tuple(slots)
        self.steps = self.clipped = 0

    def run(self, step: Step) -> None:
        from torch.nn.utils import clip_grad_norm_

        norm: Tensor = clip_grad_norm_([slot.tensor for slot in self.slots], self.limit)
        value = float(norm)
        step.metrics["gradient_norm"] = value
        self.steps += 1
        self.clipped += value > self.limit

    def summary(self) -> str | None:
        if not self.steps:
            return None
        return f"{self.name}: clipped {self.clipped} of {self.steps} steps at {self.limit:g}"
