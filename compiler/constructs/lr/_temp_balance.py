"""The action of `lr temp_balance`, and the groups of parameters that share a factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, ActionState, Phase

if TYPE_CHECKING:
    from trainc.compiler.constructs.lr.temp_balance import TempBalance
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step


@dataclass(frozen=True, slots=True)
class BalancedGroup:
    """The parameters that share one factor, and the one of them whose spectrum is measured."""

    name: str
    weight: str
    eigenvalues: int
    parameters: tuple[str, ...]


def find_groups(
    parameters: Iterable[ParameterEntry],
) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
    """Return the groups of a selection in registration order, and the parameters without a spectrum."""
    from trainc.kernels.parameter.spectrum import count

    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    groups: list[BalancedGroup] = []
    unfit: list[ParameterEntry] = []
    for name, members in modules.items():
        weights = [p for p in members if p.ndim in (2, 4) and "Embedding" not in p.types]
        vectors = [p for p in members if p.ndim == 1 and weights]
        unfit += [p for p in members if p not in weights and p not in vectors]
        if len(weights) == 1 and name:
            names = tuple(p.name for p in members if p in weights or p in vectors)
            groups.append(BalancedGroup(name, weights[0].name, count(weights[0].shape), names))
        else:
            groups += [BalancedGroup(p.name, p.name, count(p.shape), (p.name,)) for p in weights]
    return groups, unfit


class Balance(Action):
    """Phase 2: measure the exponents and set the factors; `pace` is a gate beside the clause's."""

    phase = Phase.RATES

    def __init__(
        self,
        name: str,
        construct: TempBalance,
        groups: Sequence[BalancedGroup],
        lr_factors: Sequence[LrFactor],
        few: Sequence[BalancedGroup],
        pace: Gate | None,
    ) -> None:
        self.name = name
        self.construct = construct
        self.groups = tuple(groups)
        self.lr_factors = {
            group.name: factor for group, factor in zip(groups, lr_factors, strict=True)
        }
        self.few = tuple(few)
        self.pace = pace
        self.alphas: dict[str, float] = {}
        self.measurements = 0
        self.first_spread = 0.0

    def run(self, step: Step) -> None:
        from trainc.kernels.parameter.spectrum import Hill, alphas

        if self.measurements and self.pace is not None and not self.pace.fires(step.clock):
            return
        hill = Hill(self.construct.xmin_pos, self.construct.convention)
        measured = alphas([step.parameters[group.weight] for group in self.groups], hill)
        keep, before = self.construct.smooth or 0.0, self.alphas
        self.alphas = {}
        for group, alpha in zip(self.groups, measured, strict=True):
            if math.isfinite(alpha):
                self.alphas[group.name] = keep * before.get(group.name, alpha) + (1 - keep) * alpha
            elif group.name in before or not self.measurements:
                reason = "is zero, not finite or of low rank, so its factor is 1"
                step.notes.append(f"{self.name}: `{group.weight}` {reason}")
        factors = self.construct.balance(self.alphas)
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = factors.get(name, 1.0)
        self.first_spread = self.first_spread if self.measurements else self.spread
        self.measurements += 1
        self._record(step)

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
        tail = f"; left at 1: {left}" if left else ""
        if not (self.measurements and self.lr_factors):
            return f"{self.name}: nothing measured{tail}"
        ranked = sorted(self.lr_factors, key=lambda name: self.lr_factors[name].factor)
        low, high = (f"{self.lr_factors[n].factor:.3g} ({n})" for n in (ranked[0], ranked[-1]))
        return (
            f"{self.name}: alpha spread {self.first_spread:.3g} -> {self.spread:.3g}, "
            f"measured {self.measurements}x, factors {low} to {high}{tail}"
        )
