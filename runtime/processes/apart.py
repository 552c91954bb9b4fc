"""The processes of one run that train each a replica of its own: they meet once a step, so that all end alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainc.runtime.processes.team import REQUESTS, Ranks

NOTHING, STOPS, UNSOUND, GOES_BACK = range(4)
"""How a replica ends the step that it is in: not at all, by a rule, since it is not sound, or by going back."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a replica tells the others in a step, before its weights change; `text` says why it `ends`."""

    loss: float = math.nan
    batch: int = 0
    ends: int = NOTHING
    text: str = ""
    skips: bool = False
    saves: bool = False


@dataclass(frozen=True, slots=True)
class Met:
    """What all replicas know of a step: `ends` and `text` are those of the lowest rank that ends it, or none."""

    ends: int
    text: str
    loss: float
    """The mean over the replicas that do not skip the step; NaN where all do."""
    lowest: float
    highest: float
    """The ends of these losses."""
    skipping: tuple[int, ...]
    saves: bool
    batches: Mapping[int, int]
    """Samples of the step by rank, of each replica that has begun it."""


class Apart(Ranks):
    """A run in several processes, each of which trains a replica of its own."""

    apart = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._begun = time.perf_counter()
        self._seconds = self._meeting = self._after_meeting = 0.0
        """Seconds of rank 0 from meeting to meeting, of this one up to the last meeting of its step, and after it."""

    def begin(self) -> None:
        """Begin a step."""
        self._begun = time.perf_counter()

    def meet(self, own: Standing, requested: Callable[[], str | None]) -> Met:
        """Tell the others where this replica is, and whether its process was asked to stop; return what all know."""
        passed = time.perf_counter() - self._begun
        asked = REQUESTS.index(requested())
        numbers = [asked, passed + self._after_meeting, own.loss, own.batch, own.ends]
        rows = self.group.gather_rows([*numbers, own.skips, own.saves]).tolist()
        self._requested = REQUESTS[int(max(row[0] for row in rows))]
        self._seconds, self._meeting = rows[0][1], passed
        losses = [row[2] for row in rows if not row[5] and not math.isnan(row[2])]
        kinds = [int(row[4]) for row in rows]
        ends = self._agreed(kinds)
        text = "" if ends is None else self._text_from(ends, own.text)
        if ends is not None and len(set(kinds)) > 1:
            text = f"rank {ends}: {text}"
        return Met(
            NOTHING if ends is None else kinds[ends],
            text,
            sum(losses) / len(losses) if losses else math.nan,
            min(losses, default=math.nan),
            max(losses, default=math.nan),
            tuple(rank for rank, row in enumerate(rows) if row[5]),
            any(row[6] for row in rows),
            {
                rank: int(row[3])
                for rank, row in enumerate(rows)
                if kinds[rank] in (NOTHING, UNSOUND)
            },
        )

    @staticmethod
    def _agreed(ends: Sequence[int]) -> int | None:
        """Return the rank that all follow: the lowest that ends the run, else the lowest that goes back."""
        final = (rank for rank, one in enumerate(ends) if one in (STOPS, UNSOUND))
        back = (rank for rank, one in enumerate(ends) if one == GOES_BACK)
        return next(final, next(back, None))

    def after_step(self, requested: Callable[[], str | None], seconds: float) -> float:
        """Return how many seconds rank 0 took from the meeting of the step before to that of this one."""
        self._after_meeting = max(0.0, seconds - self._meeting)
        return self._seconds

    def of_first(self, found: dict[str, float]) -> dict[str, float]:
        return self.decided(lambda: found)

    def spread(self, number: float) -> tuple[float, float, float]:
        """Return the mean of a number over all replicas, the lowest and the highest; NaN where one is."""
        numbers = self.group.gather_rows([number])[:, 0]
        return float(numbers.mean()), float(numbers.min()), float(numbers.max())
