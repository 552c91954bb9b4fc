"""`when` rules: conditions on measured signals, and when they act."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainc.runtime.rules.actions import RuleAction, Values
from trainc.runtime.rules.fields import Fields
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Count, Flag, Form, ListOf, Number, Optional, Record, Text


@dataclass(eq=False)
class Rule(Action):
    """Fires when its condition has held for `hold` without a break, then starts over.

    After it has fired it does not evaluate its condition until `cooldown` has passed. Nor does it
    before every signal in `needs` is measured once: `is nan` does not hold for an unmeasured one.
    """

    phase = Phase.BATCH
    outlasts_rollback = True
    name: str
    text: str
    """Its text without its actions."""
    whole: str
    condition: Callable[[Clock, Values], bool]
    hold: TimeSpan | None
    performs: Sequence[RuleAction]
    needs: Collection[str] = ()
    cooldown: TimeSpan | None = None
    fields: Fields = field(default_factory=Fields)
    since: float | None = field(default=None, init=False)
    cooldown_since: float | None = field(default=None, init=False)
    fired: list[int] = field(default_factory=list, init=False)
    rounding_noted: bool = field(default=False, init=False)
    """Whether a note has said why the batch size stays."""

    def run(self, step: Step) -> None:
        if self._in_cooldown(step.clock):
            return
        values = self.fields.values_at(step)
        measured = all(name in values for name in self.needs)
        if not measured or not self.condition(step.clock, values):
            self.since = None
            return
        if self.hold is not None:
            now, wanted = step.clock.position(self.hold)
            if self.since is None or self.since > now:  # a rollback has set the clock back
                self.since = now
            if now - self.since < wanted:
                return
        self.since = None
        if self.cooldown is not None:
            self.cooldown_since = step.clock.position(self.cooldown)[0]
        ending = [action for action in self.performs if action.ends]
        acted = [a.perform(step, values, self) for a in self.performs if not a.ends]
        if ending or any(acted):
            self.fired.append(step.clock.steps)
        for action in ending:
            action.perform(step, values, self)

    def _in_cooldown(self, clock: Clock) -> bool:
        """Return whether the rule fired less than `cooldown` ago."""
        if self.cooldown is None or self.cooldown_since is None:
            return False
        now, rest = clock.position(self.cooldown)
        return now - self.cooldown_since < rest

    def state_dict(self) -> ActionState:
        return {
            "text": self.whole,
            "since": self.since,
            "cooldown_since": self.cooldown_since,
            "fired": list(self.fired),
            "rounding_noted": self.rounding_noted,
        }

    def state_form(self) -> Form:
        place, fired = Optional(Number()), ListOf(Count())
        entries = {"since": place, "cooldown_since": place, "fired": fired}
        return Record({"text": Text([self.whole]), **entries, "rounding_noted": Flag()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.since = state.get("since")
        self.cooldown_since = state.get("cooldown_since")
        self.fired = list(state.get("fired", []))
        self.rounding_noted = bool(state.get("rounding_noted", False))

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        same = state.get("text", self.whole) == self.whole
        self.load_state_dict(state if same else {})
        return (
            None
            if same
            else f"{self.name}: `{self.text}` has not fired yet, because the rule is another one"
        )

    def summary(self) -> str | None:
        if not self.fired:
            return f"{self.text}: never fired"
        shown = ", ".join(map(str, self.fired[:5])) + (", ..." if len(self.fired) > 5 else "")
        if len(self.fired) == 1:
            return f"{self.text}: fired once, at step {shown}"
        return f"{self.text}: fired {len(self.fired)} times, at steps {shown}"
