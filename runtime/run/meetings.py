"""What replicas that train on their own know of each other's steps: they end the run, or go back, at the same one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from trainc.runtime.processes.apart import (
    GOES_BACK,
    NOTHING,
    STOPS,
    UNSOUND,
    Apart,
    Met,
    Standing,
)
from trainc.runtime.run.interface import Meet, UnsoundStep
from trainc.runtime.step.action import Action, Phase, RollBack, StopRun
from trainc.runtime.step.gradients import MeasureChanged
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Step

_ERRORS: Mapping[int, type[StopRun]] = {STOPS: StopRun, UNSOUND: UnsoundStep, GOES_BACK: RollBack}


class BatchesDiffer(ValueError):
    """Replicas have come to batches of different sizes, by which they divide the data."""


@dataclass(eq=False)
class Meetings:
    """Lets the replicas of a run meet in every step, once or where `MeetAgain` runs twice."""

    team: Apart
    requested: Callable[[], str | None]
    """Whether this process was asked to stop."""
    met: Met | None = field(default=None, init=False)
    """What all know of the step; None before they met in it."""

    def begin(self) -> None:
        """Begin a step."""
        self.met = None
        self.team.begin()

    def meet(self, step: Step, ends: StopRun | None, skips: bool) -> None:
        """Meet in a step whose passes have run; raises StopRun, the same in all, where a replica ends it."""
        batch = step.batch_size or step.samples
        own = Standing(step.loss, batch, _kind(ends), _text(ends), skips, step.save)
        met = self._meet(own)
        if met.ends != NOTHING:
            raise _ERRORS[met.ends](met.text)

    def ending(self, request: StopRun) -> StopRun:
        """Return with what all replicas end the step that this one ends by a request, which the others may not know.

        Raises RuntimeError where they have gone on, so that this one has failed.
        """
        if self.met is None:
            met = self._meet(Standing(ends=_kind(request), text=_text(request)))
            return _ERRORS[met.ends](met.text)
        if self.met.ends == NOTHING:
            raise RuntimeError(
                f"{_text(request)}. The other replicas had gone on when it was found, so that the run can only be"
                " resumed from its last checkpoint"
            )
        return request

    def _meet(self, own: Standing) -> Met:
        self.met = self.team.meet(own, self.requested)
        if len(set(self.met.batches.values())) > 1:
            found = self.met.batches.items()
            sizes = ", ".join(f"{size} samples on rank {rank}" for rank, size in found)
            raise BatchesDiffer(
                f"the replicas have come to batches of different sizes, and divide the data by them: {sizes}. Let what"
                " sets the batch read the clock or evaluations, and nothing that each replica measures itself"
            )
        return self.met


class MeetAgain(Action):
    """Phase 9, first: meets the others once more, where clauses change gradients, which may not be finite then.

    A replica that does not come here meets them before it leaves the step out: all meet as often.
    """

    phase = Phase.OPTIMIZER
    name = "meet again"
    reads_shards: ClassVar = True

    def __init__(self, meet: Meet) -> None:
        self.meet = meet
        self.last: Step | None = None
        """The step in which this replica met the others again."""

    @classmethod
    def where_due(cls, machine: StepMachine, meet: Meet) -> MeetAgain | None:
        """Add this to the actions of a machine, and return it, where clauses change gradients."""
        if not any(isinstance(action, MeasureChanged) for action in machine.actions):
            return None
        machine.add(again := cls(meet), first=True)
        return again

    def run(self, step: Step) -> None:
        """Meet, with nothing that ends the run; raises StopRun where another replica ends it."""
        self.tell(step, None, skips=False)

    def tell(self, step: Step, ends: StopRun | None, *, skips: bool) -> None:
        """Meet unless this was done in this step; raises StopRun, the same in all, where a replica ends the run."""
        if self.last is not step:
            self.last = step
            self.meet(step, ends, skips)


def _kind(request: StopRun | None) -> int:
    kinds = (kind for kind, error in _ERRORS.items() if isinstance(request, error))
    return max(kinds, default=NOTHING)


def _text(request: StopRun | None) -> str:
    return str(request.args[0]) if request is not None and request.args else ""
