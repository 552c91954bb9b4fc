"""What a construct may do to a program: the mechanisms, and the parts they collect.

A construct's `lower(to)` calls methods of `Lowering`; it never touches the model, the graph or another construct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.method.lowered_method import (
    CalibrationPart,
    Inputs,
    LoweredMethod,
    OptimizerConstruct,
    OptimizerPart,
    PenaltyTerm,
    Scheduled,
)
from trainc.compiler.method.sites import (
    LayerSite,
    MeasuredSite,
    NoiseSite,
    NormSite,
    Pairing,
)
from trainc.compiler.model.inventory import ModuleEntry, ParameterEntry
from trainc.compiler.model.roles import Place
from trainc.runtime.step.action import Action
from trainc.runtime.step.optimizer import LrFactor

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.lower.lowering_context import LoweringContext
    from trainc.compiler.method.example_units import Units
    from trainc.compiler.method.loss import Loss
    from trainc.dsl.values.value_json import Duration, Expr, Selector
    from trainc.runtime.schedule.clock import Gate, Unit
    from trainc.runtime.step.update_mask import SelectedEntries


class Lowering:
    """The mechanisms, as one clause sees them."""

    def __init__(self, clause: BoundClause, setting: LoweringContext, parts: LoweredMethod) -> None:
        self.clause = clause
        self.model = setting.model
        self.inventory = setting.inventory
        self._setting = setting
        self._parts = parts

    # what the clause is about

    @property
    def label(self) -> str:
        return self.clause.label

    def modules(self) -> tuple[ModuleEntry, ...]:
        """Return the selected modules."""
        return self.clause.modules(self.inventory)

    def parameters(self) -> tuple[ParameterEntry, ...]:
        """Return the selected parameters."""
        return self.clause.parameters(self.inventory)

    def tensor(self, name: str) -> nn.Parameter:
        """Return the user's parameter object."""
        return self.model.get_parameter(name)

    def select(
        self, selector: Selector, target: Literal["modules", "parameters"]
    ) -> tuple[str, ...]:
        """Return what a selector in a field matches."""
        from trainc.compiler.model.select import select

        return select(selector, self.inventory, target)

    # time

    def schedule(self, expression: Expr, place: Place | None = None) -> Scheduled:
        """Return an expression of the clock, the signals and a place's depth as a function of the clock."""
        from trainc.compiler.lower.open_ended import UNBOUNDED, ends_with_the_run
        from trainc.dsl.values.value_json import to_json
        from trainc.runtime.schedule.schedules import compile_schedule

        data = to_json(expression)
        length = self._setting.length
        if length is None:
            if ends_with_the_run(data):
                raise ValueError(
                    "the schedule ends with the run, and this spec has no `run` clause"
                )
            length = UNBOUNDED
        evaluate = compile_schedule(data, self._setting.units, length, self._setting.signal_units)
        signals = self._setting.signals
        if place is None:
            return lambda clock: evaluate(clock, signals)
        fixed = {"depth": place.depth, "block": float(place.block), "blocks": float(place.blocks)}
        return lambda clock: evaluate(clock, type(signals)(signals | fixed))

    def steps(self, duration: Duration) -> float:
        """Return a duration in optimizer steps, at the declared batch size."""
        from trainc.runtime.schedule.clock import Duration as ClockDuration

        return self._setting.units.convert(
            ClockDuration(duration.amount, duration.unit), "steps", self._setting.length
        )

    def amount(self, expression: Expr, unit: Unit) -> Scheduled:
        """Return an expression of signals as a function of the clock; raises ValueError for another unit."""
        from trainc.compiler.lower.open_ended import UNBOUNDED
        from trainc.dsl.values.value_json import to_json
        from trainc.runtime.schedule.schedules import Schedules

        length, signals = self._setting.length or UNBOUNDED, self._setting.signals
        units = self._setting.signal_units
        value = Schedules(self._setting.units, length, units).compile(to_json(expression))
        if value.unit != unit:
            counts = f"counts {value.unit}" if value.unit else f"does not count {unit}"
            fit = [name for name, counted in units.items() if counted == unit]
            known = f"; {', '.join(f'`{name}`' for name in fit)} do" if fit else ""
            raise ValueError(
                f"`{expression}` {counts}, and a batch is a number of {unit}{known}; a plain number becomes one by"
                f" `* 1 {unit}`"
            )
        return lambda clock: value.at(clock, signals)

    @property
    def starting_batch(self) -> int | None:
        """Return the samples of the first step; None in a spec that names no data."""
        size = self._setting.units.samples_per_step
        return None if size is None else int(size)

    def window(self, start: Duration | None, stop: Duration | None, every: Duration | None) -> Gate:
        """Return durations as a clock gate, those of the run in its unit and `start` in that of `every`."""
        from trainc.runtime.schedule.clock import Duration as ClockDuration
        from trainc.runtime.schedule.clock import Gate

        given = (start, stop, every)
        bounds = (None if d is None else ClockDuration(d.amount, d.unit) for d in given)
        gate = Gate.resolve(self._setting.units, self._setting.length, *bounds)
        for bound in (gate.start, gate.stop, gate.every):
            if bound and bound.unit == "epochs" and not self._setting.units.samples_per_epoch:
                missing = "the data does not say how many samples it has"
                raise ValueError(f"{bound} cannot be counted: {missing}")
        return gate

    def gate(self) -> Gate | None:
        """Return the clause's `from`, `until` and `every` as a clock gate; None when it has none."""
        from trainc.runtime.schedule.clock import Duration as ClockDuration
        from trainc.runtime.schedule.clock import Gate

        bounds = (self.clause.start, self.clause.stop, self.clause.every)
        if not any(bounds):
            return None
        durations = (None if b is None else ClockDuration.from_json(b) for b in bounds)
        return Gate.resolve(self._setting.units, self._setting.length, *durations)

    def _while_open(self, schedule: Scheduled) -> Scheduled:
        """Return a schedule that is zero outside the clause's time."""
        gate = self.gate()
        return (
            schedule
            if gate is None
            else lambda clock: schedule(clock) if gate.fires(clock) else 0.0
        )

    # mechanisms

    def loss(self, loss: Loss) -> None:
        """Declare the loss."""
        self._parts.loss = loss

    def measure(self, site: MeasuredSite) -> None:
        """Measure per-example squared gradient norms of a layer, for every step's contributions."""
        rewrite = self._parts.rewrite
        known = next((one for one in rewrite.measured if one.module == site.module), None)
        if isinstance(site, LayerSite):
            if known is None:
                rewrite.layers.append(site)
            return
        if isinstance(known, NormSite):
            rewrite.norms.remove(known)
            site = replace(site, wide=site.wide or known.wide)
        rewrite.norms.append(site)

    def units(self, units: Units | None) -> None:
        """Say what one example is; raises ValueError when another clause says otherwise."""
        rewrite = self._parts.rewrite
        if rewrite.measured and rewrite.units != units:
            raise ValueError(
                "another clause measures examples of another sort: one program has one sort of example"
            )
        rewrite.units = units

    def ghosts(self, names: Iterable[str]) -> None:
        """Let layers that normalize over the batch do so over each group of examples."""
        self._parts.rewrite.ghosts = list(names)

    def whole_gradients(self, names: Iterable[str], running: bool) -> None:
        """Have the squared norm of each micro-batch's gradient taken, or of a replica's so far (`running`)."""
        for name in names:
            if self._parts.whole.setdefault(name, running) != running:
                raise ValueError(f"`{name}` is measured by micro-batch and by replica: choose one")

    def calibrate(self, every: Duration, examples: int) -> None:
        """Now and then, measure every parameter on a few examples, one by one."""
        from trainc.runtime.schedule.clock import Duration as ClockDuration
        from trainc.runtime.schedule.clock import Gate

        period = ClockDuration(every.amount, every.unit)
        gate = Gate.resolve(self._setting.units, self._setting.length, every=period)
        self._parts.calibrations.append(CalibrationPart(self.label, gate, examples))

    def noise(
        self, module: ModuleEntry, sigma: Expr, share: Literal["token", "none"] = "token"
    ) -> None:
        """Multiply a layer's output by `1 + sigma * normal`, drawn per (view, example, channel)."""
        site = NoiseSite(module.name, len(self._parts.rewrite.noises), share)
        self._parts.rewrite.noises.append(site)
        self._parts.scalars[site.scalar] = self._while_open(self.schedule(sigma, module.place))

    def pair(self, distance: Literal["mse", "kl"], weight: Expr) -> None:
        """Pass every example twice and add `weight` times the distance of the two outputs to the loss."""
        self._parts.rewrite.pairing = Pairing(distance, self.label)
        self._parts.scalars[self._parts.rewrite.pairing.weight] = self._while_open(
            self.schedule(weight)
        )

    def penalty(
        self,
        value: Callable[[Inputs, Inputs], Tensor],
        parameters: Iterable[str],
        scalars: Mapping[str, Scheduled],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Add a loss term over parameters. Scheduled numbers and constants reach it as named tensors."""
        self._parts.penalties[self.label] = PenaltyTerm(value, tuple(parameters))
        self._parts.scalars.update(scalars)
        self._parts.tensors.update(tensors)

    def lr_factor(self, unit: str, parameters: Iterable[str]) -> LrFactor:
        """Return a factor of this clause on the rate of `parameters`; it starts at 1."""
        lr_factor = LrFactor(self.label, unit)
        for name in parameters:
            self._parts.lr_factors.setdefault(name, []).append(lr_factor)
        return lr_factor

    def compact(self, name: str, compact: SelectedEntries) -> None:
        """Let the optimizer see the selected entries of a parameter in place of the whole."""
        self._parts.compacts[name] = compact

    def freeze(self, names: Iterable[str]) -> None:
        """Leave parameters untrained."""
        self._parts.frozen.update(names)

    def optimizer(
        self, construct: OptimizerConstruct, base: Scheduled, decay: dict[str, float]
    ) -> None:
        """Claim the selected parameters for a torch optimizer."""
        clause = self.clause
        self._parts.optimizers.append(
            OptimizerPart(clause.label, clause.targets, clause.span, construct, base, decay)
        )

    def action(self, action: Action) -> None:
        """Run an action in every step, in its phase, when the clause's gate is open."""
        if action.gate is None:
            action.gate = self.gate()
        self._parts.actions.append(action)
