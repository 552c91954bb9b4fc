"""Policies of the batch size: they choose before each step how many samples it averages over.

A size is a whole number of micro-batches, so that another size only accumulates more or fewer of
them. A choice is a function of the clock, of measured signals and of state in the checkpoint: a
resumed run has the batches of the uninterrupted one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Count, Form, Number, Optional, Record
from trainc.runtime.torch_optimizer.slots import LrFactor

SignalReader = Callable[[Clock], float]

# A size this close to a whole number of micro-batches counts as that number.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Bounds:
    """The sizes a policy may choose, in samples: from `low` to `high`, whole micro-batches."""

    low: int
    high: int
    micro: int

    def clip(self, size: float) -> float:
        """Return the nearest size within the bounds."""
        return min(max(size, self.low), self.high)


class BatchPolicy(Action):
    """Phase 1: sets the batch to the size that `choose` returns; `text` is the policy as the spec has it.

    The batch begins at `start` and is at most `end` samples, in micro-batches of `micro`. It `depends` on what the plan
    says.
    """

    phase = Phase.BATCH
    depends: ClassVar[str] = "measured signals"

    def __init__(self, name: str, text: str, start: int, end: int, micro: int) -> None:
        self.name, self.text = name, text
        self.end, self.micro = end, micro
        self.start = self.last = start
        self.changes = 0

    @abstractmethod
    def choose(self, clock: Clock, present: int) -> int:
        """Return the samples of the step that begins at a clock; `present` is the size of the step before."""

    def run(self, step: Step) -> None:
        present = step.batch_size
        self.last = self.choose(step.clock, present)
        if self.last != present:
            step.notes.append(f"batch {present} -> {self.last} samples: {self.text}")
            step.batch_size = self.last
            self.changes += 1

    def state_dict(self) -> ActionState:
        return {"changes": self.changes, "last": self.last}

    def state_form(self) -> Form:
        return Record({"changes": Count(), "last": Count(1)}, {"changed_at": Optional(Number())})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.changes = int(state.get("changes", 0))
        self.last = int(state.get("last", self.start))

    def summary(self) -> str | None:
        times = "once" if self.changes == 1 else f"{self.changes} times"
        changed = f"changed {times}, {self.start} -> {self.last} samples"
        return f"{self.name}: batch {changed if self.changes else f'stayed at {self.last} samples'}"


class Ramp(BatchPolicy):
    """Goes linearly from one size to another over a counter of the clock, rounded up to micro-batches.

    The schedule of Gray et al. 2024 (arXiv 2411.00999) is the one in tokens. `begin` is in the
    unit of `over`, None for the start of the run.
    """

    def __init__(
        self, name: str, text: str, ends: tuple[int, int], micro: int, over: TimeSpan,
        begin: TimeSpan | None = None,
    ) -> None:  # fmt: skip
        self.ends, self.over, self.begin = ends, over, begin
        super().__init__(name, text, round_up(ends[0], micro), round_up(ends[1], micro), micro)

    def choose(self, clock: Clock, present: int) -> int:
        return self.at(clock)

    def at(self, clock: Clock) -> int:
        """Return the size at a clock."""
        now, span = clock.position(self.over)
        begin = clock.position(self.begin)[1] if self.begin else 0.0
        fraction = min(max((now - begin) / span, 0.0), 1.0)
        first, last = self.ends
        return round_up(first + (last - first) * fraction, self.micro)


def round_up(size: float, micro: int) -> int:
    """Return `size` rounded up to a whole number of micro-batches."""
    return max(1, math.ceil(size / micro - ROUNDING)) * micro


class Follow(BatchPolicy):
    """Follows `factor` times a signal that counts samples, in multiples of `grain`.

    The size changes only where the wanted one, clipped to the bounds but not yet rounded, is
    `grain` or more away from the present one: noise around a boundary between two sizes changes
    nothing. It changes at most once in `every`; while the signal is NaN it stays.
    """

    def __init__(
        self, name: str, text: str, signal: SignalReader, bounds: Bounds, grain: int,
        factor: float = 1.0, every: TimeSpan | None = None, *, grow_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name, text, bounds.low, bounds.high, bounds.micro)
        self.signal, self.bounds, self.grain = signal, bounds, grain
        self.factor, self.every, self.grow_only = factor, every, grow_only
        self.changed_at: float | None = None

    def choose(self, clock: Clock, present: int) -> int:
        wanted = self.factor * self.signal(clock)
        if math.isnan(wanted):
            return present
        wanted = self.bounds.clip(wanted)
        if abs(wanted - present) < self.grain or (self.grow_only and wanted < present):
            return present
        if self.every is not None:
            now, least = clock.position(self.every)
            if self.changed_at is not None and now - self.changed_at < least:
                return present
            self.changed_at = now
        return int(self.bounds.clip(math.floor(wanted / self.grain + 0.5) * self.grain))

    def state_dict(self) -> ActionState:
        return {**super().state_dict(), "changed_at": self.changed_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.changed_at = state.get("changed_at")


class SignalNoise(BatchPolicy):
    """Grows the batch so that noise / signal of the averaged gradient stays at `theta` squared.

    B_{k+1} = max(ceil(tr(Sigma) / (theta^2 |G|^2)), B_k), rounded up to micro-batches and capped.
    `signal` is tr(Sigma) / |G|^2 of the gradient; `gate` says when it is read.
    """

    def __init__(
        self, name: str, text: str, signal: SignalReader, bounds: Bounds, theta: float, gate: Gate
    ) -> None:
        super().__init__(name, text, bounds.low, bounds.high, bounds.micro)
        self.signal, self.bounds, self.theta, self.gate = signal, bounds, theta, gate

    def choose(self, clock: Clock, present: int) -> int:
        wanted = self.signal(clock) / self.theta**2
        if math.isnan(wanted):
            return present
        samples = math.ceil(self.bounds.clip(wanted))
        return max(math.ceil(samples / self.bounds.micro) * self.bounds.micro, present)


class Seesaw(BatchPolicy):
    """Grows the batch where the schedule of the learning rate falls, which then falls by the root of that alone.

    Meterez et al. 2025 (arXiv 2510.14717): where a schedule would halve the rate, the rate is multiplied by 1 / sqrt(2)
    and the batch doubled. With s the rate of now over the highest so far, the batch is `start / s`, rounded down to
    micro-batches, and `factor` on the rate is `sqrt(batch / start)`. When the batch is at its largest, the rate falls
    as scheduled.
    """

    depends = "the learning rate"

    def __init__(
        self, name: str, text: str, rate: SignalReader, bounds: Bounds, factor: LrFactor
    ) -> None:
        super().__init__(name, text, bounds.low, bounds.high, bounds.micro)
        self.rate, self.bounds, self.factor = rate, bounds, factor
        factor.of_batch = self._factor
        self.highest = 0.0

    def _factor(self, size: int) -> float:
        return math.sqrt(size / self.start)

    def choose(self, clock: Clock, present: int) -> int:
        rate = self.rate(clock)
        if math.isnan(rate):
            return present
        self.highest = max(rate, self.highest)
        wanted = self.start * self.highest / rate if rate else math.inf
        wanted = self.bounds.clip(wanted)
        return max(1, math.floor(wanted / self.micro + ROUNDING)) * self.micro

    def run(self, step: Step) -> None:
        super().run(step)
        self.factor.factor = self._factor(self.last)

    def state_dict(self) -> ActionState:
        return {**super().state_dict(), "highest": self.highest}

    def state_form(self) -> Form:
        return Record({"changes": Count(), "last": Count(1), "highest": Number()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.highest = float(state.get("highest", 0.0))
        self.factor.factor = self._factor(self.last)
