"""What a construct may know of its clause while it is lowered: the selection, the times, numbers of the clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.errors import FieldError, RuleRefused
from trainc.compiler.lower.lowering_context import (
    LoweringContext,
    depends_on_run_length,
    refuse_places,
)
from trainc.compiler.lower.schedule_field import ScheduleField
from trainc.compiler.method.lowered_method import (
    LoweredMethod,
    NeedsWhole,
    OptimizerConstruct,
    Scheduled,
)
from trainc.compiler.model.inventory import ModuleEntry, ParameterEntry
from trainc.compiler.model.select import select
from trainc.compiler.structure.places import Place
from trainc.dsl.text.vocabulary import PLACES
from trainc.dsl.values.value_json import (
    Duration,
    Expr,
    Items,
    Number,
    Scoped,
    Selector,
    to_json,
)
from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.expressions import names_read
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.schedules import Schedules, compile_schedule
from trainc.runtime.schedule.time_span import Duration as AnyDuration
from trainc.runtime.schedule.time_span import Unit
from trainc.runtime.step.optimizer import Option, OptionValue


class ClauseAccess:
    """One clause while it is lowered: its selection and its times."""

    def __init__(
        self, clause: BoundClause, context: LoweringContext, method: LoweredMethod
    ) -> None:
        self.clause = clause
        self.model = context.model
        self.inventory = context.inventory
        self._context = context
        self._method = method
        self._times_obeyed = False

    # What the clause selects

    @property
    def label(self) -> str:
        """Return the clause's name: its `as`, or else the name of its construct."""
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

    def optimizer_of(self, name: str) -> OptimizerConstruct | None:
        """Return the construct of the optimizer clause that selects a parameter; None where none does."""
        return self._method.trained_by.get(name)

    def is_sharded(self, name: str) -> bool:
        """Say whether a parameter is sharded over processes, or will be in a run of the spec."""
        return self._method.shards or is_sharded(self.tensor(name))

    def refuse_shards(self, names: Iterable[str], why: str, instead: str) -> None:
        """Raise ValueError where a parameter is sharded over processes; the first step asks again.

        `why` is the reason to need it whole, and `instead` a sentence on what to do.
        """
        need = NeedsWhole(self.label, tuple(names), why, instead)
        if (shard := next(filter(self.is_sharded, need.parameters), None)) is not None:
            raise ValueError(need.message(shard))
        self._method.needs_whole.append(need)

    def select(
        self, selector: Selector, target: Literal["modules", "parameters"]
    ) -> tuple[str, ...]:
        """Return the names that the selector in a field matches; `target` is what the field's type says."""
        return select(selector, self.inventory, target)

    def has_sparse_gradient(self, name: str) -> bool:
        """Say whether a parameter is the weight of a layer that gives it a sparse gradient."""
        owners = map(self.model.get_submodule, self.inventory.parameter[name].modules)
        return any(isinstance(o, nn.Embedding | nn.EmbeddingBag) and o.sparse for o in owners)

    # Times and numbers of the clock

    @property
    def starting_batch(self) -> int | None:
        """Return the samples of the first step; None in a spec that names no data."""
        size = self._context.units.samples_per_step
        return None if size is None else int(size)

    @property
    def tokens_per_sample(self) -> int | None:
        """Return the tokens of one sample of the data, 1 where it has none; None in a spec that names no data."""
        size = self._context.units.tokens_per_sample
        return None if size is None else int(size)

    @property
    def training_samples(self) -> int | None:
        """Return the samples of the training data; None where the data does not say, or the spec names none."""
        count = self._context.units.samples_per_epoch
        return None if count is None else int(count)

    def steps(self, duration: Duration) -> float:
        """Return a duration in optimizer steps, at the declared batch size."""
        return self._context.units.convert(duration, "steps", self._context.length)

    def schedule(self, expression: Expr, place: Place | None = None) -> Scheduled:
        """Return an expression of the clock, the signals and a place in the model as a function of the clock.

        Where the type of its field allows no negative numbers, one in a step is an error of the step, which names the
        field; so is a number that is not finite.
        """
        return self._scheduled(expression, place, placed=place is not None)

    def _scheduled(self, expression: Expr, place: Place | None, *, placed: bool) -> Scheduled:
        """Return an expression in a field as a function of the clock; a `placed` one is not of the whole model."""
        field = ScheduleField.of(self.clause, expression)
        try:
            checked = field.checked(self._evaluated(expression, place), self._context)
        except ValueError as error:
            raise FieldError(field.name, str(error)) from error
        if not field.name:
            return checked
        fields, name = self._context.fields, f"{field.label}.{field.name}"
        return fields.add(name, checked, field.check_set, placed=placed)

    def is_constant(self, expression: Expr) -> bool:
        """Say whether a field is one number in the whole run, which no rule sets."""
        name = f"{self.label}.{ScheduleField.of(self.clause, expression).name}"
        return isinstance(expression, Number) and name not in self._context.fields.settable

    def schedules_of(self, field: str) -> dict[str, OptionValue]:
        """Return what a field of schedules by selector says of each selected parameter that an entry of it is for.

        Parameters of one entry, and of one place where it reads the place, share one object.
        """
        found: dict[str, OptionValue] = {}
        value = getattr(self.clause.construct, field)
        for entry in value if isinstance(value, tuple) else (Scoped(value),):
            own = set(self.clause.targets)
            names = (
                own if entry.on is None else own.intersection(self.select(entry.on, "parameters"))
            )
            reads = set(names_read(to_json(entry.value))) & set(PLACES)
            made: dict[Place | None, OptionValue] = {}
            for name in (n for n in self.clause.targets if n in names):
                place = self.inventory.parameter[name].place if reads else None
                if place not in made:
                    made[place] = self._option(entry, place)
                found[name] = made[place]
        return found

    def _option(self, entry: Scoped, place: Place | None) -> OptionValue:
        """Return the number of an entry of a field, or the numbers of its list."""
        on = "" if entry.on is None else f" on {entry.on}"
        at = "" if place is None else f" at depth {place.depth:.3g}"
        value = entry.value
        assert isinstance(value, Expr)
        placed = bool(on or at) or isinstance(value, Items)

        def option(expression: Expr) -> Option:
            schedule = self._scheduled(expression, place, placed=placed)
            constant = schedule(Clock()) if self.is_constant(expression) else None
            return Option(schedule, str(expression), constant, on + at)

        return tuple(map(option, value.items)) if isinstance(value, Items) else option(value)

    def _evaluated(self, expression: Expr, place: Place | None) -> Scheduled:
        context, data = self._context, to_json(expression)
        if context.length is None and depends_on_run_length(data):
            raise ValueError(
                "the schedule ends with the run, but the spec has no `run` clause: add `run { length = ... }`"
            )
        evaluate = compile_schedule(
            data, context.units, context.schedule_length, context.signal_units
        )
        signals = context.signals
        if place is None:
            refuse_places(data, str(expression))
            return lambda clock: evaluate(clock, signals)
        fixed = {"depth": place.depth, "block": float(place.block), "blocks": float(place.blocks)}
        return lambda clock: evaluate(clock, type(signals)(signals | fixed))

    def amount(self, expression: Expr, unit: Unit) -> Scheduled:
        """Return an expression of signals as a function of the clock; raises ValueError if it does not count `unit`."""
        context, signals, known = self._context, self._context.signals, self._context.signal_units
        refuse_places(to_json(expression), str(expression))
        value = Schedules(context.units, context.schedule_length, known).compile(
            to_json(expression)
        )
        if value.unit != unit:
            counts = f"counts {value.unit}" if value.unit else f"does not count {unit}"
            fit = [f"`{name}`" for name, counted in known.items() if counted == unit]
            use = f"use {', '.join(fit)}, or " if fit else ""
            raise ValueError(
                f"`{expression}` {counts}, but a batch is a number of {unit}: {use}multiply a plain number by"
                f" `1 {unit}`"
            )
        return lambda clock: value.at(clock, signals)

    def gate(self) -> Gate | None:
        """Return the clause's `from`, `until` and `every` as a clock gate; None when it has none."""
        self._times_obeyed = True
        return self._gate_of(self.clause.every)

    def _gate_of(self, every: AnyDuration | None) -> Gate | None:
        """Return the gate of the clause with a period; None where it is always open."""
        bounds = (self.clause.start, self.clause.stop, every)
        switched = self.label in self._context.switches.names
        return self._context.gate(*bounds, self.label) if any(bounds) or switched else None

    def while_open(self, schedule: Scheduled) -> Scheduled:
        """Return a schedule that is zero outside the clause's `from` and `until`."""
        if (gate := self.gate()) is None:
            return schedule
        return lambda clock: schedule(clock) if gate.fires(clock) else 0.0

    def window(self, start: Duration | None, stop: Duration | None, every: Duration | None) -> Gate:
        """Return durations given in fields as a clock gate; raises ValueError where epochs cannot be counted."""
        gate = self._context.gate(start, stop, every)
        for bound in (gate.start, gate.stop, gate.every):
            if bound and bound.unit == "epochs" and not self._context.units.samples_per_epoch:
                raise ValueError(
                    f"`{bound}` cannot be counted, because the data does not say how many samples an epoch has:"
                    " write it in steps or samples"
                )
        return gate

    def refuse_times(self, reason: str, *words: Literal["from", "until", "every"]) -> None:
        """Raise ValueError if the clause has one of these times, which its construct does not take."""
        if "until" in words and self.label in self._context.switches.names:
            raise RuleRefused(f"{reason}: no rule can open or close `{self.label}`", self.label)
        bounds = {"from": self.clause.start, "until": self.clause.stop, "every": self.clause.every}
        for word in words:
            if (bound := bounds[word]) is not None:
                raise ValueError(f"{reason}: remove `{word} {bound}`")
