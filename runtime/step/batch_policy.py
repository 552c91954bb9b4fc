"""Policies of the batch size: what chooses, before each step, how many samples it averages over.

A size is a whole number of micro-batches, so that changing it changes nothing but how many of them
are accumulated. What a policy decides is a function of the clock, of what was measured, and of the
state it checkpoints: a resumed run takes the batches of the uninterrupted one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, Phase, State

if TYPE_CHECKING:
    from trainc.runtime.schedule.clock import Clock, Duration, Gate
    from trainc.runtime.step.record import Step

Signal = Callable[["Clock"], float]

# What a size may exceed a whole number of micro-batches by and still be that number.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Bounds:
    """The sizes a policy may choose, in samples: from `low` to `high`, whole micro-batches."""

    low: int
    high: int
    micro: int

    def clip(self, size: float) -> float:
        """Return the nearest number inside the bounds."""
        return min(max(size, self.low), self.high)


class BatchPolicy(Action):
    """Phase 1: takes the size that `choose` gives; `text` is what the spec says.

    The batch begins at `start` and ends at, or is at most, `end` samples, in micro-batches of `micro`.
    """

    phase = Phase.BATCH

    def __init__(self, name: str, text: str, start: int, end: int, micro: int) -> None:
        self.name, self.text = name, text
        self.start = self.last = start
        self.end, self.micro = end, micro
        self.changes = 0

    @abstractmethod
    def choose(self, clock: Clock, present: int) -> int:
        """Return the samples of the step that begins at a clock; `present` is the size before."""

    def run(self, step: Step) -> None:
        present = step.batch_size
        self.last = self.choose(step.clock, present)
        if self.last != present:
            step.notes.append(f"batch {present} -> {self.last} samples: {self.text}")
            step.batch_size = self.last
            self.changes += 1

    def state_dict(self) -> State:
        return {"changes": self.changes, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.changes = int(state.get("changes", 0))
        self.last = int(state.get("last", self.start))

    def summary(self) -> str | None:
        times = "once" if self.changes == 1 else f"{self.changes} times"
        changed = f"changed {times}, {self.start} -> {self.last} samples"
        return f"{self.name}: batch {changed if self.changes else f'stayed at {self.last} samples'}"


class Ramp(BatchPolicy):
    """Goes from one size to another on a line in a counter of the clock, rounded up.

    The schedule of Gray et al. 2024 (arXiv 2411.00999) is the one in tokens. `begun` is in the
    unit of `over`, None for the start of the run.
    """

    def __init__(
        self, name: str, text: str, ends: tuple[int, int], micro: int, over: Duration,
        begun: Duration | None = None,
    ) -> None:  # fmt: skip
        self.ends, self.over, self.begun = ends, over, begun
        super().__init__(name, text, _whole(ends[0], micro), _whole(ends[1], micro), micro)

    def choose(self, clock: Clock, present: int) -> int:
        return self.at(clock)

    def at(self, clock: Clock) -> int:
        """Return the size at a clock, which depends on nothing else."""
        now, span = clock.position(self.over)
        begun = clock.position(self.begun)[1] if self.begun else 0.0
        part = min(max((now - begun) / span, 0.0), 1.0)
        first, last = self.ends
        return _whole(first + (last - first) * part, self.micro)


def _whole(size: float, micro: int) -> int:
    """Return `size` rounded up to a whole number of micro-batches."""
    return max(1, math.ceil(size / micro - _ROUNDING)) * micro


class Follow(BatchPolicy):
    """Holds the batch at `factor` times a signal that counts samples, in multiples of `grain`.

    The size changes only where the wanted one, clipped to the bounds but not yet rounded, is
    `grain` or more away from the present one: noise about a boundary between two sizes moves
    nothing. It changes at most once in `every`; while the signal is NaN it stays.
    """

    def __init__(
        self, name: str, text: str, signal: Signal, bounds: Bounds, grain: int,
        factor: float = 1.0, every: Duration | None = None, *, grow_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name, text, bounds.low, bounds.high, bounds.micro)
        self.signal, self.bounds, self.grain = signal, bounds, grain
        self.factor, self.every, self.grow_only = factor, every, grow_only
        self.changed: float | None = None

    def choose(self, clock: Clock, present: int) -> int:
        wanted = self.factor * self.signal(clock)
        if math.isnan(wanted):
            return present
        wanted = self.bounds.clip(wanted)
        if abs(wanted - present) < self.grain or (self.grow_only and wanted < present):
            return present
        if self.every is not None:
            now, least = clock.position(self.every)
            if self.changed is not None and now - self.changed < least:
                return present
            self.changed = now
        return int(self.bounds.clip(math.floor(wanted / self.grain + 0.5) * self.grain))

    def state_dict(self) -> State:
        return {**super().state_dict(), "changed": self.changed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.changed = state.get("changed")


class SignalNoise(BatchPolicy):
    """Grows the batch to keep noise / signal of the averaged gradient at `theta` squared.

    B_{k+1} = max(ceil(tr(Sigma) / (theta^2 |G|^2)), B_k), rounded up to micro-batches and capped.
    `signal` is tr(Sigma) / |G|^2, the noise scale; the gate says when it is looked at.
    """

    def __init__(
        self, name: str, text: str, signal: Signal, bounds: Bounds, theta: float, gate: Gate
    ) -> None:
        super().__init__(name, text, bounds.low, bounds.high, bounds.micro)
        self.signal, self.bounds, self.theta, self.gate = signal, bounds, theta, gate

    def choose(self, clock: Clock, present: int) -> int:
        wanted = self.signal(clock) / self.theta**2
        if math.isnan(wanted):
            return present
        samples = math.ceil(self.bounds.clip(wanted))
        return max(math.ceil(samples / self.bounds.micro) * self.bounds.micro, present)
