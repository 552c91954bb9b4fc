"""The action of a policy that measures: it sets factors at the clause's times, and keeps them until the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Protocol

from trainc.runtime.factors.course import Course
from trainc.runtime.factors.maps import NO_SPREAD
from trainc.runtime.factors.measuring import Measures, Measuring, Read
from trainc.runtime.factors.units import (
    BalancedGroup,
    Control,
    MeasuredPart,
    Unit,
    by_unit,
    controlled,
    unit_means,
)
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import AnyNumber, Count, Form, Number, Record

if TYPE_CHECKING:
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step


class Policy(Measures, Protocol):
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

    def gain(
        self,
        figures: Mapping[str, float],
        parts: Sequence[MeasuredPart],
        members: Mapping[str, list[str]],
    ) -> float:
        """Return how much of the factors to keep, by how much of the figures' spread is noise: 1 is all."""
        ...

    def factors(self, figures: Mapping[str, float], gain: float) -> dict[str, float]:
        """Return the factor of each unit."""
        ...


@dataclass(eq=False)
class BalanceFactors(Action):
    """Phase 2: measure figures and set the factors; `pace` is a second gate besides the clause's.

    `read` gives the matrices of weights, or of their parts, as they are now, by their names. `highest` is the name of
    the factor that follows the largest one, where there is such a factor.
    """

    phase = Phase.RATES
    reads_shards = True
    name: str
    policy: Policy
    read: Read
    groups: Sequence[BalancedGroup]
    lr_factors: Mapping[str, LrFactor]
    few: Sequence[BalancedGroup]
    pace: Gate | None
    course: Course
    highest: str | None = None
    measuring: Measuring = field(default_factory=Measuring)
    alphas: dict[str, float] = field(default_factory=dict)
    measurements: int = 0
    first_spread: float = 0.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        self.parts = {part.name: part for group in self.groups for part in group.parts}
        self.units = by_unit(self.groups, self.policy.unit)
        self.members = {
            unit: [part.name for group in groups for part in group.parts]
            for unit, groups in self.units.items()
        }

    def is_due(self, step: Step) -> bool:
        """Return whether it measures in this step, or a factor is on its way, or a measurement has failed."""
        self.measuring.refresh.step()
        failed = self.measuring.failed is not None
        return failed or super().is_due(step) or self.course.is_moving(step.clock)

    def _measures(self, step: Step) -> bool:
        if not (super().is_due(step) and self.measuring.refresh.is_due(step.clock.steps)):
            return False
        return not self.measurements or self.pace is None or self.pace.fires(step.clock)

    def run(self, step: Step) -> None:
        self.measuring.raise_failure()
        if self._measures(step):
            shapes = {part.weight: part.shape for part in self.parts.values()}
            self.measuring.begin(step, shapes, self.read, self.policy)
            if not self.measuring.beside:
                self.end(step, step.clock)
                return
        self._set_factors(step.clock)

    def end(self, step: Step, clock: Clock) -> None:
        """End a measurement: its factors act from the step at a clock on."""
        if (figures := self.measuring.end(step)) is not None:
            self._follow(figures, step.notes, clock)
            self._set_factors(clock)
            self._record(step)

    def _set_factors(self, clock: Clock) -> None:
        for name, lr_factor in self.lr_factors.items():
            lr_factor.factor = self.course.at(name, clock)

    def _follow(self, figures: Mapping[str, float], notes: list[str], clock: Clock) -> None:
        """Send the factors of all groups where the figures of the parts that were measured say."""
        keep, before = self.policy.smooth or 0.0, self.alphas
        self.alphas = {}
        for name, part in self.parts.items():
            figure = figures.get(part.weight)
            if figure is None:
                self.alphas |= {n: before[n] for n in (name,) if n in before}
            elif math.isfinite(figure):
                self.alphas[name] = keep * before.get(name, figure) + (1 - keep) * figure
            elif name in before or not self.measurements:
                reason = (
                    "is zero, of low rank or orthogonal, or a mask left too little of it, so it is not"
                    " measured"
                )
                notes.append(f"{self.name}: `{part.weight}` {reason}")
        if not (self.measurements or self._differ()):
            notes.append(
                f"{self.name}: fewer than two {self.policy.unit}s have a figure of their own, or all have the same, so"
                " that all factors are 1"
            )
        # Of a first spread that is all noise no factor would follow, ever.
        if self.policy.control != "static" or not (self.measurements and self.gain):
            self.course.aim(self._targets(), clock)
        self.first_spread = self.first_spread if self.measurements else self.spread
        self.measurements += 1

    def _differ(self) -> bool:
        """Say whether there are figures of units that differ."""
        found = unit_means(self.alphas, self.members).values()
        return max(found, default=0.0) - min(found, default=0.0) > NO_SPREAD * max(
            map(abs, found), default=0.0
        )

    def _targets(self) -> dict[str, float]:
        """Return the factors that the figures ask for; a control may change what they follow."""
        self.gain = self.policy.gain(self.alphas, [*self.parts.values()], self.members)
        figures = controlled(
            unit_means(self.alphas, self.members), self.policy.control, self.measurements
        )
        try:
            found = self.policy.factors(figures, self.gain)
        except ValueError as wrong:
            raise ValueError(f"{self.name}: {wrong}") from wrong
        targets = dict.fromkeys(self.lr_factors, 1.0)
        for unit, groups in self.units.items():
            known = (g for g in groups if any(part.name in self.alphas for part in g.parts))
            targets |= {group.name: found[unit] for group in known}
        if self.highest is not None:
            targets[self.highest] = max(found.values(), default=1.0)
        return targets

    @property
    def spread(self) -> float:
        """Return the standard deviation of the figures over the measured parts."""
        return pstdev(self.alphas.values()) if self.alphas else 0.0

    def _record(self, step: Step) -> None:
        factors = {name: lr_factor.factor for name, lr_factor in self.lr_factors.items()}
        step.series[f"{self.name}.alpha"] = dict(self.alphas)
        of = next((one.of for one in self.lr_factors.values()), "lr")
        step.series[f"{self.name}.{'lr' if of == 'lr' else 'decay'}_factor"] = factors
        if self.alphas:
            mean = fmean(self.alphas.values())
            found = {"spread": self.spread, "alpha": mean, "gain": self.gain}
            named = {f"{self.name}.{signal}": value for signal, value in found.items()}
            step.signals.update(named)
            step.metrics.update(named)

    def state_dict(self) -> ActionState:
        if not self.measurements:
            return {}
        out: ActionState = {
            "measurements": self.measurements,
            "first_spread": self.first_spread,
            "gain": self.gain,
        }
        out |= self.measuring.state()
        return out | self.course.state() | {f"alpha/{n}": alpha for n, alpha in self.alphas.items()}

    def state_form(self) -> Form:
        entries: dict[str, Form] = {
            "measurements": Count(1),
            "first_spread": Number(0),
            "gain": Number(0, 1),
        }
        factors, ramps = self.course.form()
        figures = {f"alpha/{name}": AnyNumber() for name in self.parts}
        counts, kept = self.measuring.form([part.weight for part in self.parts.values()])
        return Record(entries | factors | counts, ramps | figures | kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kept = ("copy/", "room/")
        named = {k: k.partition("/")[2] for k in state if "/" in k and not k.startswith(kept)}
        for name in named.values():
            if name not in self.lr_factors and name not in self.parts:
                raise ValueError(
                    f"{self.name}: the checkpoint has a factor for `{name}`, which this clause does not select"
                )
        self.alphas = {n: float(state[k]) for k, n in named.items() if k.startswith("alpha/")}
        self.course.load(state)
        self.measuring.load(state)
        for name, lr_factor in self.lr_factors.items():
            # One on a ramp is set in the next step, by the clock.
            lr_factor.factor = self.course.moves[name].target
        self.measurements = int(state.get("measurements", 0))
        self.first_spread = float(state.get("first_spread", 0.0))
        self.gain = float(state.get("gain", 1.0))

    def memory(self) -> int:
        return self.measuring.memory()

    def summary(self) -> str | None:
        left = ", ".join(f"{group.name} ({group.eigenvalues} eigenvalues)" for group in self.few)
        tail = f"; too few eigenvalues, factor 1: {left}" if left else ""
        if not (self.measurements and self.lr_factors):
            return f"{self.name}: nothing measured{tail}"
        ranked = sorted(self.lr_factors, key=lambda name: self.lr_factors[name].factor)
        low, high = (f"{self.lr_factors[n].factor:.3g} ({n})" for n in (ranked[0], ranked[-1]))
        kept = "" if self.gain == 1 else f", {self.gain:.0%} of it more than noise"
        return (
            f"{self.name}: alpha spread {self.first_spread:.3g} -> {self.spread:.3g}{kept}, "
            f"measured {self.measurements}x, factors {low} to {high}{tail}"
        )


@dataclass(eq=False)
class AwaitFigures(Action):
    """Phase 11, which skipped steps have, too: end the measurement that a policy began beside the passes.

    So all figures are in a checkpoint, which one process alone may save, and no thread outlives its step.
    """

    phase = Phase.EXCHANGE
    reads_shards = True
    balance: BalanceFactors

    def __post_init__(self) -> None:
        self.name = f"{self.balance.name} figures"

    def is_due(self, step: Step) -> bool:
        """Return whether a measurement began in this step."""
        return self.balance.measuring.has_begun(step)

    def run(self, step: Step) -> None:
        self.balance.end(step, step.clock_after())
