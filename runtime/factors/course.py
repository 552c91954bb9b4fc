"""How factors move from one measurement to the next: at once or on a ramp, and not for small changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainc.runtime.storage.form import AnyNumber, Form, Number

if TYPE_CHECKING:
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.schedule.time_span import TimeSpan


@dataclass(slots=True)
class Move:
    """A factor on its way from `start` to `target`, since the clock's counter was `began`."""

    start: float = 1.0
    target: float = 1.0
    began: float = 0.0


@dataclass(slots=True)
class Course:
    """The factors of `names`, which all start at 1.

    A new target counts where it differs from the last one by more than `hysteresis`. The factor then goes to it
    linearly over `ramp`, from what it is now; at once without one.
    """

    names: tuple[str, ...]
    hysteresis: float = 0.0
    ramp: TimeSpan | None = None
    moves: dict[str, Move] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moves = {name: Move() for name in self.names}

    def aim(self, targets: Mapping[str, float], clock: Clock) -> None:
        """Send each factor to its target, where that is another one."""
        began = self._position(clock)
        for name, target in targets.items():
            move = self.moves[name]
            if abs(target - move.target) > self.hysteresis:
                self.moves[name] = Move(self.at(name, clock), target, began)

    def at(self, name: str, clock: Clock) -> float:
        """Return a factor in the step at this clock."""
        move = self.moves[name]
        part = self._part(move, clock)
        return move.target if part >= 1 else move.start + part * (move.target - move.start)

    def is_moving(self, clock: Clock) -> bool:
        """Say whether a factor may differ from that of the step before."""
        before = clock if clock.before is None else clock.before
        return self.ramp is not None and any(
            move.start != move.target and self._part(move, before) < 1
            for move in self.moves.values()
        )

    def _position(self, clock: Clock) -> float:
        return 0.0 if self.ramp is None else clock.position(self.ramp)[0]

    def _part(self, move: Move, clock: Clock) -> float:
        """Return how much of its way a factor has gone, from 0 to 1 and more."""
        if self.ramp is None:
            return 1.0
        now, length = clock.position(self.ramp)
        return (now - move.began) / length

    def state(self) -> dict[str, float]:
        """Return the state as a flat dict: `factor/NAME` is the target, and on a ramp there is where it began."""
        found: dict[str, float] = {}
        for name, move in self.moves.items():
            found[f"factor/{name}"] = move.target
            if self.ramp is not None:
                found |= {f"start/{name}": move.start, f"began/{name}": move.began}
        return found

    def form(self) -> tuple[dict[str, Form], dict[str, Form]]:
        """Return what a state has to have, and what it may have besides."""
        factors: dict[str, Form] = {f"factor/{name}": Number(0) for name in self.names}
        ramps: Iterable[tuple[str, Form]] = (
            (f"{part}/{name}", form)
            for name in self.names
            for part, form in (("start", Number(0)), ("began", AnyNumber()))
        )
        return factors, dict(ramps)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave; all factors are 1 without one."""
        for name in self.names:
            target = float(state.get(f"factor/{name}", 1.0))
            start = float(state.get(f"start/{name}", target))
            self.moves[name] = Move(start, target, float(state.get(f"began/{name}", 0.0)))
