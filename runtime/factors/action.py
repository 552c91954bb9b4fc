"""The action of a policy that measures: it sets factors at the clause's times, and keeps them until the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Protocol

from trainc.runtime.factors.units import BalancedGroup, Control, Unit, by_unit, controlled
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import AnyNumber, Count, Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step


class Policy(Protocol):
    """What decides the factors: how weights are measured, and how factors follow from the figures."""

    @property
    def unit(self) -> Unit:
        """Return what has a figure of its own."""
        ...

    @property
    def control(self) -> Control:
        """Return what the factors follow in place of the figures."""
        ...

    @property
    def smooth(self) -> float | None:
        """Return the weight of the previous figure in the new one."""
        ...

    def measure(self, weights: Sequence[Tensor]) -> list[float]:
        """Return the figure of each weight, NaN where it means nothing."""
        ...

    def balance(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return the factor of each unit."""
        ...


@dataclass(eq=False)
class BalanceFactors(Action):
    """Phase 2: measure the exponents and set the factors; `pace` is a second gate besides the clause's."""

    phase = Phase.RATES
    reads_shards = True
    name: str
    policy: Policy
    groups: Sequence[BalancedGroup]
    lr_factors: Mapping[str, LrFactor]
    few: Sequence[BalancedGroup]
    pace: Gate | None
    alphas: dict[str, float] = field(default_factory=dict)
    measurements: int = 0
    first_spread: float = 0.0

    def run(self, step: Step) -> None:
        from trainc.runtime.processes.sharded import full

        if self.measurements and self.pace is not None and not self.pace.fires(step.clock):
            return
        measured = self.policy.measure(
            [full(step.parameters[group.weight]) for group in self.groups]
        )
        keep, before = self.policy.smooth or 0.0, self.alphas
        self.alphas = {}
        for group, alpha in zip(self.groups, measured, strict=True):
            if math.isfinite(alpha):
                self.alphas[group.name] = keep * before.get(group.name, alpha) + (1 - keep) * alpha
            elif group.name in before or not self.measurements:
                reason = "is zero, not finite or of low rank, so its factor is 1"
                step.notes.append(f"{self.name}: `{group.weight}` {reason}")
        self._set_factors()
        self.first_spread = self.first_spread if self.measurements else self.spread
        self.measurements += 1
        self._record(step)

    def _set_factors(self) -> None:
        """Set the factors from the exponents, and let a control change what they follow."""
        of = self.policy
        if of.control == "static" and self.measurements:
            return
        blocks = {group.name: group.block for group in self.groups} if of.unit == "block" else None
        units, members = by_unit(self.alphas, blocks)
        found = of.balance(controlled(units, of.control, self.measurements))
        factors = {name: found[unit] for unit, names in members.items() for name in names}
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = factors.get(name, 1.0)

    @property
    def spread(self) -> float:
        """Return the standard deviation of the exponents over the measured groups."""
        return pstdev(self.alphas.values()) if self.alphas else 0.0

    def _record(self, step: Step) -> None:
        factors = {name: lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        step.series[f"{self.name}.alpha"] = dict(self.alphas)
        step.series[f"{self.name}.lr_factor"] = factors
        if self.alphas:
            mean = fmean(self.alphas.values())
            found = {f"{self.name}.spread": self.spread, f"{self.name}.alpha": mean}
            step.signals.update(found)
            step.metrics.update(found)

    def state_dict(self) -> ActionState:
        if not self.measurements:
            return {}
        out: ActionState = {"measurements": self.measurements, "first_spread": self.first_spread}
        out |= {f"factor/{name}": lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        return out | {f"alpha/{name}": alpha for name, alpha in self.alphas.items()}

    def state_form(self) -> Form:
        entries: dict[str, Form] = {"measurements": Count(1), "first_spread": Number(0)}
        entries |= {f"factor/{name}": Number(0) for name in self.lr_factors}
        return Record(entries, {f"alpha/{name}": AnyNumber() for name in self.lr_factors})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        named = {key: key.partition("/")[2] for key in state if "/" in key}
        for name in named.values():
            if name not in self.lr_factors:
                raise ValueError(
                    f"{self.name}: the checkpoint has a factor for `{name}`, which this clause does not select"
                )
        self.alphas = {n: float(state[k]) for k, n in named.items() if k.startswith("alpha/")}
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = float(state.get(f"factor/{name}", 1.0))
        self.measurements = int(state.get("measurements", 0))
        self.first_spread = float(state.get("first_spread", 0.0))

    def summary(self) -> str | None:
        left = ", ".join(f"{group.name} ({group.eigenvalues} eigenvalues)" for group in self.few)
        tail = f"; too few eigenvalues, factor 1: {left}" if left else ""
        if not (self.measurements and self.lr_factors):
            return f"{self.name}: nothing measured{tail}"
        ranked = sorted(self.lr_factors, key=lambda name: self.lr_factors[name].factor)
        low, high = (f"{self.lr_factors[n].factor:.3g} ({n})" for n in (ranked[0], ranked[-1]))
        return (
            f"{self.name}: alpha spread {self.first_spread:.3g} -> {self.spread:.3g}, "
            f"measured {self.measurements}x, factors {low} to {high}{tail}"
        )
