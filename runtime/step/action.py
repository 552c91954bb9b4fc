"""Actions: what constructs become. An action has a phase, declared effects, a gate and its own state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainc.runtime.schedule.clock import Gate
    from trainc.runtime.step.record import Step


class Phase(IntEnum):
    """The twelve phases of one optimizer step, in order."""

    BATCH = 1
    RATES = 2
    PERTURB = 3
    FORWARD = 4
    BACKWARD = 5
    UNDO = 6
    REDUCE = 7
    GRADIENTS = 8
    OPTIMIZER = 9
    DELTAS = 10
    EXCHANGE = 11
    OBSERVE = 12


State = dict[str, Any]


class Action(ABC):
    """One thing a step does. Subclasses set `phase` and `name`; `gate` None means every step."""

    phase: Phase
    name: str
    gate: Gate | None = None

    @abstractmethod
    def run(self, step: Step) -> None:
        """Act on the step; metrics go to `step.metrics`, measured values to `step.signals`."""

    def state_dict(self) -> State:
        """Return what must survive a checkpoint: flat, tensors and JSON scalars."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has {sorted(state)}")

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        """Take over what fits of the state of a clause that said something else.

        Return what does not go on, in a line; None where all of it does. Raises ValueError where
        nothing can be made of it.
        """
        self.load_state_dict(state)
        return None

    def memory(self) -> int:
        """Return how many bytes this keeps beyond weights, gradients and optimizer state."""
        return 0

    def summary(self) -> str | None:
        """Return one line on what this did over the run, as found; None when there is nothing to say."""
        return None


class StopRun(Exception):
    """Raised by an action to end the run after this step; the reason is the message."""


class IncompatibleState(ValueError):
    """The checkpoint's state of a changed clause cannot be loaded, not even in part."""
