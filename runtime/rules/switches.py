"""Clauses that rules open and close, and parameters that they freeze."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Flag, Form, Record


class Kept(Action):
    """Phase 1: keeps what rules decided by name, yes or no; nothing of a name that no rule has touched yet."""

    phase = Phase.BATCH
    outlasts_rollback = True
    let_go: ClassVar[str]
    """What holds of names that rules decided on, and that they do not know any more."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = frozenset(names)
        """What rules may decide on."""
        self.decided: dict[str, bool] = {}

    def run(self, step: Step) -> None:
        """Do nothing: rules set what this holds."""

    def state_dict(self) -> ActionState:
        return dict(self.decided)

    def state_form(self) -> Form:
        return Record(optional=dict.fromkeys(self.names, Flag()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.decided.clear()
        self.decided.update({name: bool(value) for name, value in state.items()})

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        self.load_state_dict({name: value for name, value in state.items() if name in self.names})
        lost = sorted(
            name for name, value in state.items() if name not in self.names and self.matters(value)
        )
        if not lost:
            return None
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return f"{self.name}: {self.let_go}: {lost[0]}{others}"

    def matters(self, value: bool) -> bool:
        """Say whether what was decided is not what holds without rules."""
        return True

    def shown(self, wanted: bool) -> str:
        """Return the names of which this was decided, as text."""
        return ", ".join(sorted(name for name, value in self.decided.items() if value == wanted))


class Switches(Kept):
    """Which clauses rules have opened or closed; the others go by their times."""

    name = "clauses switched by rules"
    let_go = "no rule switches these any more, and they act by their times"

    def switch(self, clause: str, opens: bool, step: Step, rule: str) -> bool:
        """Open or close a clause from this step on, say so in the step's notes, and return whether that is new."""
        if self.decided.get(clause) == opens:
            return False
        self.decided[clause] = opens
        step.notes.append(f"{'opened' if opens else 'closed'} {clause}: {rule}")
        return True

    def gate_of(self, clause: str, by_time: Gate) -> Gate:
        """Return the gate of a clause, which rules may switch."""
        if clause not in self.names:
            return by_time
        return SwitchedGate(by_time.start, by_time.stop, by_time.every, self, clause)

    def summary(self) -> str | None:
        said = (("opened", self.shown(True)), ("closed", self.shown(False)))
        found = [f"{word} by rules at the end: {names}" for word, names in said if names]
        return "; ".join(found) or None


@dataclass(frozen=True, slots=True)
class SwitchedGate(Gate):
    """A gate that is as it was switched last, whatever its `start` and `stop`; by its times before that."""

    switches: Switches = field(default_factory=Switches)
    clause: str = ""

    def fires(self, clock: Clock) -> bool:
        opened = self.switches.decided.get(self.clause)
        if opened is None:
            return Gate.fires(self, clock)
        return opened and Gate(every=self.every).fires(clock)

    def span(self) -> Gate:
        return SwitchedGate(self.start, self.stop, None, self.switches, self.clause)


class Frozen(Kept):
    """Which parameters rules have frozen."""

    name = "parameters frozen by rules"
    who = "a rule"
    let_go = "no rule freezes these any more, and they train"

    def matters(self, value: bool) -> bool:
        return value

    def freeze(self, names: Iterable[str], freezes: bool, text: str, step: Step, rule: str) -> bool:
        """Freeze or unfreeze parameters from this step on, say so in its notes, and return whether that is new."""
        new = [name for name in names if self.decided.get(name, False) != freezes]
        self.decided |= dict.fromkeys(new, freezes)
        if new:
            count = f"{len(new)} parameter{'s' * (len(new) != 1)}"
            step.notes.append(f"{'froze' if freezes else 'unfroze'} {text} ({count}): {rule}")
        return bool(new)

    @property
    def now(self) -> set[str]:
        """The parameters that are frozen."""
        return {name for name, frozen in self.decided.items() if frozen}

    def summary(self) -> str | None:
        frozen = self.now
        if not frozen:
            return None
        return f"frozen by rules at the end: {len(frozen)} parameters, `{min(frozen)}` among them"
