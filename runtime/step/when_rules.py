"""`when` rules: conditions on what was measured, held for a while, that act on the batch or on the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, Phase, State, StopRun
from trainc.runtime.step.record import Signals

if TYPE_CHECKING:
    from trainc.runtime.schedule.clock import Clock, Duration
    from trainc.runtime.step.record import Step

Values = Mapping[str, float]

# What a wanted batch may miss a whole number of micro-batches by and still be that number.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Act:
    """One act of a rule: `verb` is `set` (the batch), `stop`, `save` or `warn`."""

    verb: str
    value: Callable[[Clock, Values], float] | None = None
    text: str = ""


def whole_micros(wanted: float, present: int, micro: int) -> int:
    """Return the whole number of micro-batches, at least one, between `present` and `wanted` that is nearest to it."""
    if wanted >= present:
        return max(present, math.floor(wanted / micro + _ROUNDING) * micro)
    return min(present, max(1, math.ceil(wanted / micro - _ROUNDING)) * micro)


class Rule(Action):
    """Fires when its condition has held for `hold` without a break, then starts to wait again.

    After it fired it does not look at its condition again before `cooldown` has passed. It waits
    until every signal in `needs` was measured once: what was not measured is not NaN either.
    """

    phase = Phase.BATCH

    def __init__(
        self,
        name: str,
        text: str,
        condition: Callable[[Clock, Values], bool],
        hold: Duration | None,
        performs: Sequence[Act],
        needs: Collection[str] = (),
        cooldown: Duration | None = None,
    ) -> None:
        self.name, self.text = name, text
        self.condition, self.hold, self.performs = condition, hold, tuple(performs)
        self.needs, self.cooldown = tuple(needs), cooldown
        self.since: float | None = None
        self.rests_since: float | None = None
        self.fired: list[int] = []
        self.stuck = False
        """Whether it was told that a batch asked for is less than a micro-batch away."""

    def run(self, step: Step) -> None:
        if self._rests(step.clock):
            return
        values = Signals(step.signals | {"batch": float(step.batch_size)})
        measured = all(name in values for name in self.needs)
        if not measured or not self.condition(step.clock, values):
            self.since = None
            return
        if self.hold is not None:
            now, wanted = step.clock.position(self.hold)
            if self.since is None:
                self.since = now
            if now - self.since < wanted:
                return
        self.since = None
        self.fired.append(step.clock.steps)
        if self.cooldown is not None:
            self.rests_since = step.clock.position(self.cooldown)[0]
        for act in self.performs:
            self._act(act, step, values)

    def _rests(self, clock: Clock) -> bool:
        """Say whether it fired less than `cooldown` ago."""
        if self.cooldown is None or self.rests_since is None:
            return False
        now, rest = clock.position(self.cooldown)
        return now - self.rests_since < rest

    def _act(self, act: Act, step: Step, values: Values) -> None:
        if act.verb == "stop":
            raise StopRun(f"the rule `{self.text}` stopped the run")
        if act.verb == "save":
            step.save = True
        elif act.verb == "warn":
            step.notes.append(act.text or self.text)
        elif act.value is not None:
            self._set_batch(act.value(step.clock, values), step)

    def _set_batch(self, wanted: float, step: Step) -> None:
        """Take the wanted batch in whole micro-batches; what is not finite changes nothing.

        What is no whole number of them is rounded towards the present batch: never past what was asked for, and never
        the other way. A batch that stays for that alone is told, once.
        """
        if not math.isfinite(wanted):
            return
        size = whole_micros(wanted, step.batch_size, step.micro_size or 1)
        if size != step.batch_size:
            step.notes.append(f"batch {step.batch_size} -> {size} samples: {self.text}")
            step.batch_size = size
        elif wanted != size and not self.stuck:
            self.stuck = True
            step.notes.append(
                f"batch stays at {size} samples, whole micro-batches of {step.micro_size}, where {wanted:.6g} was asked"
                f" for: {self.text}"
            )

    def state_dict(self) -> State:
        return {
            "since": self.since,
            "rests_since": self.rests_since,
            "fired": list(self.fired),
            "stuck": self.stuck,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.since = state.get("since")
        self.rests_since = state.get("rests_since")
        self.fired = list(state.get("fired", []))
        self.stuck = bool(state.get("stuck", False))

    def summary(self) -> str | None:
        if not self.fired:
            return f"{self.text}: never fired"
        shown = ", ".join(map(str, self.fired[:5])) + (", ..." if len(self.fired) > 5 else "")
        return f"{self.text}: fired {len(self.fired)} times, at steps {shown}"
