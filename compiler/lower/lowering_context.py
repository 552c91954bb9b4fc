"""What all clauses of one program share while they are lowered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainc.compiler.model.inventory import Inventory
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import PLACES
from trainc.runtime.rules.fields import Fields
from trainc.runtime.rules.switches import Frozen, Switches
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.expressions import names_read
from trainc.runtime.schedule.functions import SCHEDULE_FUNCTIONS
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import Duration, TimeSpan, Unit
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.record import Signals

UNBOUNDED = RunLength(2.0**52, "steps")
"""A length that no training reaches, for specs without a `run` clause."""


@dataclass(frozen=True, slots=True)
class LoweringContext:
    """The model, its inventory, the units of time and the measured signals; `length` is None without a `run` clause."""

    model: nn.Module
    inventory: Inventory
    units: UnitConversion
    length: RunLength | None
    signals: Signals
    signal_units: Mapping[str, Unit] = field(default_factory=dict)
    """What the signals of clauses count; those that are not here are plain numbers."""
    fields: Fields = field(default_factory=Fields)
    """The scheduled fields of clauses, which rules read and set."""
    switches: Switches = field(default_factory=Switches)
    """The clauses that rules open and close."""
    frozen: Frozen = field(default_factory=Frozen)
    """The parameters that rules freeze."""
    switched_at: Mapping[str, Span | None] = field(default_factory=dict)
    """Where rules open or close clauses, by their labels."""
    seed: int = 0
    """The seed of the run."""

    @property
    def schedule_length(self) -> RunLength:
        """Return the length that schedules are compiled for; without a run it is never reached."""
        return self.length or UNBOUNDED

    def counted(self, duration: Duration) -> TimeSpan:
        """Return a duration as the clock counts it: a fraction of the run in its unit."""
        span, length = TimeSpan.of(duration), self.schedule_length
        if span.unit != "run":
            return span
        return TimeSpan(self.units.convert(span, length.unit, self.length), length.unit)

    def gate(
        self,
        start: Duration | None,
        stop: Duration | None,
        every: Duration | None,
        clause: str = "",
    ) -> Gate:
        """Return durations as a clock gate, fractions of the run in its unit and `start` in that of `every`.

        It is of the `clause` of this name, which rules may open and close. Raises ValueError where it would never fire,
        because `stop` is not after `start` in the same unit.
        """
        try:
            gate = Gate.resolve(self.units, self.length, start, stop, every)
        except ValueError as error:
            if not (start and every) or start.unit in ("run", every.unit):
                raise
            raise ValueError(f"{error}: write `every` in {start.unit}, as `from` is") from error
        first, last = gate.start, gate.stop
        if first and last and first.unit == last.unit and first.amount >= last.amount:
            raise ValueError(
                f"it would never act, because `from {start}` is not before `until {stop}`: move one of them, or remove"
                " the clause"
            )
        return self.switches.gate_of(clause, gate)


def refuse_places(expression: Any, text: str) -> None:
    """Raise ValueError where an expression, given as JSON, reads the place of a layer and there is none."""
    if used := sorted(set(names_read(expression)) & set(PLACES)):
        raise ValueError(
            f"`{text}` reads `{used[0]}`, the place of a layer, but is one number for the whole model: write it without"
            f" `{used[0]}`"
        )


_UNTIL_THE_END = {"cosine", "linear", "cubic", "exponential", "wsd"}
"""The functions that last until the end of the run if they have no `over`."""


def _arguments(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of a call, without percentages that are plain numbers and no part of the run."""
    if name not in SCHEDULE_FUNCTIONS:
        return [*args, *options.values()]
    function = SCHEDULE_FUNCTIONS[name]
    given = function.bind_arguments(name, args, options)
    numbers = [key for key in given if function.arguments[key] == "number"]
    return [v for key, v in given.items() if key not in numbers or v[0] != "dur"]


def depends_on_run_length(expression: Any) -> bool:
    """Say whether the value of an expression, given as JSON, depends on the length of the run."""
    match expression:
        case ["dur", _, "run"]:
            return True
        case ["call", name, args, options]:
            if name in _UNTIL_THE_END and "over" not in options:
                return True
            return any(depends_on_run_length(given) for given in _arguments(name, args, options))
        case [str(), *parts]:
            return any(depends_on_run_length(part) for part in parts)
        case list():
            return any(map(depends_on_run_length, expression))
    return False
