"""Actions: the parts of a step that constructs add. Each has a phase, declared effects, a gate and its own state."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.runtime.storage.form import Anything, Form, Record

if TYPE_CHECKING:
    from trainc.runtime.schedule.gate import Gate
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


ActionState = dict[str, Any]


class ClauseFailed(ValueError):
    """What a clause does in a step is not possible; `clause` is its label, and the message says why.

    `field` is the field that it is about, or empty.
    """

    def __init__(self, clause: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.clause, self.field = clause, field


@contextmanager
def failures_of(name: str) -> Iterator[None]:
    """Raise a ValueError of this block as ClauseFailed of the clause that named an action so."""
    try:
        yield
    except ValueError as error:
        if hasattr(error, "clause"):  # it says already where it is
            raise
        # An action is called as its clause, and more where this has several.
        label = re.split(r"\W", name)[0]
        raise ClauseFailed(label, str(error), getattr(error, "field", "")) from error


class Action(ABC):
    """One part of a step. Subclasses set `phase` and `name`; it runs when it `is_due`: when `gate` fires."""

    phase: Phase
    name: str
    gate: Gate | None = None
    reads_shards: ClassVar[bool] = False
    """Whether it can read `step.parameters` that are sharded over processes (FSDP2), of which it sees DTensors."""
    outlasts_rollback: ClassVar[bool] = False
    """Whether it keeps its state where the run goes back to a checkpoint, as what rules did."""
    runs_model: ClassVar[bool] = False
    """Whether it runs the model and the loss, as an optimizer's closure does, whose errors are not its own."""
    figures: tuple[str, ...] = ()
    """Attributes that only the summary shows, numbers or lists of them: a checkpoint keeps them as well."""

    def is_due(self, step: Step) -> bool:
        """Return whether it runs in this step: when its gate fires, in every step without one."""
        return self.gate is None or self.gate.fires(step.clock)

    def run_in(self, step: Step) -> None:
        """Run in a step as this action may read it."""
        every = step.parameters
        if not self.reads_shards:
            step.parameters = WholeParameters(every, self.name)
        try:
            with nullcontext() if self.runs_model else failures_of(self.name):
                self.run(step)
        finally:
            step.parameters = every

    @abstractmethod
    def run(self, step: Step) -> None:
        """Run this part of a step; metrics go to `step.metrics`, measured values to `step.signals`."""

    def state_dict(self) -> ActionState:
        """Return the state that a checkpoint keeps: a flat dict of tensors and JSON scalars."""
        return {}

    def state_form(self) -> Form:
        """Return what a state of this action is, where it has one: a state is compared with it before it is loaded.

        Of an action that does not say more, any state is left to its `load_state_dict`.
        """
        return Record(more=Anything())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            raise ValueError(
                f"`{self.name}` has no state, but the checkpoint has {', '.join(sorted(state))} for this action"
            )

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        """Load the parts of a state that still hold, saved under a clause with other fields.

        Return in one line what restarts or is dropped; None where nothing does. Raises ValueError
        where no part can be loaded.
        """
        self.load_state_dict(state)
        return None

    def memory(self) -> int:
        """Return how many bytes this holds besides weights, gradients and optimizer state."""
        return 0

    def summary(self) -> str | None:
        """Return one line for the summary of the run; None for no line."""
        return None

    def summary_after(self, steps: int) -> str | None:
        """Return this line after so many steps of the run: a line that depends on how many there were."""
        return self.summary()


class WholeParameters(Mapping[str, Any]):
    """The parameters of a step for an action that reads whole ones; raises ValueError for one that is sharded."""

    def __init__(self, parameters: Mapping[str, Any], reader: str) -> None:
        self._parameters, self._reader = parameters, reader

    def __getitem__(self, name: str) -> Any:
        found = self._parameters[name]
        if hasattr(found, "device_mesh"):
            raise ValueError(
                f"`{self._reader}` reads whole parameters, and `{name}` is sharded over processes (FSDP2): use"
                " DistributedDataParallel, or remove the clause"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def check_phase(action: Action) -> None:
    """Raise ValueError for an action in `forward` or `backward`: there the model runs, and no action does."""
    if action.phase in (Phase.FORWARD, Phase.BACKWARD):
        raise ValueError(
            f"the action `{action.name}` is in phase `{action.phase.name.lower()}`, in which a step runs the model and"
            " no action: put it in `perturb`, before the forward pass, or in `undo` or later, after the backward pass"
        )


class StopRun(Exception):
    """Raised by an action to end the run after this step; the message is the reason.

    One that ends it before the step has the step's `notes`.
    """

    notes: tuple[str, ...] = ()


class RollBack(StopRun):
    """Raised by a rule, before a step: the run is to go on from its last good checkpoint."""


class IncompatibleState(ValueError):
    """No part of the checkpoint's state fits a changed clause."""
