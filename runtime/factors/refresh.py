"""What is measured at a time, how often, and in which process: what keeps a policy that measures cheap."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from trainc.runtime.processes.replica_group import ReplicaGroup

if TYPE_CHECKING:
    from trainc.runtime.step.record import Step

LEAST = 10
"""The least number of steps between two measurements under a budget."""
SEEN = 64
"""How many steps, the last ones, the time of a step is taken from."""
SAME = 0.2
"""By which part of itself an interval may differ from what a budget asks for, before another is chosen."""


def divided(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Return the numbers of things with these costs in parts of nearly equal cost, each in ascending order.

    The dearest is given first, to the part that is cheapest so far. Parts may be empty.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cheapest = totals.index(min(totals))
        found[cheapest].append(i)
        totals[cheapest] += costs[i]
    return [sorted(part) for part in found]


def cost(shape: Sequence[int]) -> float:
    """Return about how long it takes to measure a weight, in any unit: its Gram matrix, and the eigenvalues of it.

    Eigenvalues run at about a tenth of the speed of products.
    """
    matrices = math.prod(shape[2:])
    short, long = sorted(shape[:2])
    return float(matrices * short * short * (long + 10 * short))


Figures = tuple[float, float]
"""What is measured of a weight, and the norm of a change that it allows without another measurement."""


def shared(
    names: Sequence[str],
    owners: Mapping[str, int],
    own: Mapping[str, Figures],
    peers: ReplicaGroup | None,
) -> dict[str, Figures]:
    """Return the figures of all `names`, of which each process has measured its `own`, by the ranks of their `owners`.

    All processes of `peers` must call this alike, and get the same numbers.
    """
    if peers is None:
        return {name: own[name] for name in names}
    row = [figure for n in names for figure in own.get(n, (math.nan, math.nan))]
    rows = peers.gather_rows(row).tolist()
    return {n: (rows[owners[n]][2 * i], rows[owners[n]][2 * i + 1]) for i, n in enumerate(names)}


def owners(costs: Mapping[str, float], peers: ReplicaGroup | None) -> dict[str, int]:
    """Return the rank of the process that measures each of the things with these costs."""
    parts = divided([*costs.values()], 1 if peers is None else peers.size)
    names = [*costs]
    return {names[i]: rank for rank, part in enumerate(parts) for i in part}


@dataclass(eq=False)
class Refresh:
    """When a policy measures, and what: all at first, then one of `parts` parts a time, in turn.

    With a `budget`, a fraction of the time of the steps, the steps between two measurements are chosen at the second
    measurement and at each one after it, from the time that this took and that of the steps before. They stay where
    others would be within `SAME` of them. They are part of the state, and each choice is a decision of its step, so
    that a resumed run measures when an uninterrupted one does. Of several processes with the same weights rank 0
    chooses; replicas with weights of their own choose each for themselves. `now` reads seconds.
    """

    name: str = ""
    parts: int = 1
    budget: float | None = None
    now: Callable[[], float] = time.perf_counter
    turn: int = field(default=0, init=False)
    last: int | None = field(default=None, init=False)
    """The steps that had run at the last measurement."""
    interval: int | None = field(default=None, init=False)
    """The steps between two measurements, once they were chosen."""
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=SEEN), init=False)
    _before: float | None = field(default=None, init=False)
    _begun: float = field(default=0.0, init=False)

    def step(self) -> None:
        """Notice that a step begins."""
        if self.budget is not None:
            now = self.now()
            if self._before is not None:
                self._steps.append(now - self._before)
            self._before = now

    def is_due(self, steps: int) -> bool:
        """Return whether the budget allows to measure after so many steps."""
        if self.budget is None or self.last is None:
            return True
        return steps - self.last >= (self.interval or LEAST)

    def begin(self, costs: Sequence[float]) -> list[int]:
        """Return the numbers of what is measured now, of all that have these costs."""
        self._begun = self.now()
        if self.last is None or self.parts == 1:
            return [*range(len(costs))]
        return divided(costs, self.parts)[self.turn]

    def end(self, step: Step, peers: ReplicaGroup | None) -> str | None:
        """Count a measurement in a step; return in words what was chosen, where it is another interval."""
        took, first = self.now() - self._begun, self.last is None
        self.turn = 0 if first else (self.turn + 1) % self.parts
        self.last = step.clock.steps
        if self.budget is None or first:
            return None
        before = self.interval
        chosen, again = step.decide(self.name, partial(self._choose, took))
        if peers is not None:
            chosen = int(peers.gather_rows([chosen])[0, 0])
        self.interval = chosen
        if chosen == before:
            return None
        why = (
            "as this run decided before it was resumed"
            if again
            else f"a measurement takes {took:.3g} s, a step {median(self._steps or [0.0]):.3g} s,"
            f" and the budget is {100 * self.budget:g} %"
        )
        return f"{self.name}: measures every {chosen} steps: {why}"

    def _choose(self, took: float) -> int:
        """Return the steps between two measurements that the budget allows, for one that took so long."""
        step = median(self._steps or [0.0])
        if self.budget is None or step <= 0:
            return self.interval or LEAST
        wanted = max(LEAST, math.ceil(took / (self.budget * step)))
        if self.interval is not None and abs(wanted - self.interval) <= SAME * self.interval:
            return self.interval
        return wanted

    @property
    def names(self) -> tuple[str, ...]:
        """Return what there is in the state after the first measurement: nothing where the clock decides alone."""
        return () if self.budget is None and self.parts == 1 else ("turn", "last", "interval")

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint keeps, numbers by name; empty before the first measurement."""
        found = {"turn": self.turn, "last": self.last or 0, "interval": self.interval or 0}
        return {} if self.last is None else {name: found[name] for name in self.names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.turn = int(state.get("turn", 0)) % self.parts
        self.last = int(state["last"]) if "last" in state else None
        self.interval = int(state.get("interval", 0)) or None
        self._steps.clear()
        self._before = None
