"""What `when` rules do when they act."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from trainc.runtime.rules.fields import Fields
from trainc.runtime.rules.switches import Frozen, Switches
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import RollBack, StopRun
from trainc.runtime.step.batch_policy import ROUNDING, round_up
from trainc.runtime.step.record import Step

Values = Mapping[str, float]
Value = Callable[[Clock, Values], float]


class Acting(Protocol):
    """The rule that an action belongs to."""

    text: str
    """Its text without its actions."""
    rounding_noted: bool
    """Whether a note has said why the batch size stays."""


class RuleAction(ABC):
    """One action of a rule."""

    ends: ClassVar[bool] = False
    """Whether the step does not begin after it: it is performed after the rule's other actions."""

    @abstractmethod
    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        """Do it in the step that is about to begin; return whether that changes anything."""


@dataclass(frozen=True, slots=True)
class Stop(RuleAction):
    """`stop`: end the run before this step."""

    ends: ClassVar = True

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        raise StopRun(f"the rule `{rule.text}` stopped the run")


@dataclass(frozen=True, slots=True)
class GoBack(RuleAction):
    """`rollback`: go on from the last good checkpoint, with what rules decided up to now."""

    ends: ClassVar = True

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        raise RollBack(
            f"the rule `{rule.text}` goes back to the last good checkpoint: in a loop of your own, call"
            " `program.roll_back(state)` with the state of one"
        )


@dataclass(frozen=True, slots=True)
class Evaluate(RuleAction):
    """`evaluate`: ask for an evaluation after this step."""

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        step.evaluate = True
        return True


@dataclass(frozen=True, slots=True)
class Save(RuleAction):
    """`save`: ask for a checkpoint after this step."""

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        step.save = True
        return True


@dataclass(frozen=True, slots=True)
class Warn(RuleAction):
    """`warn "text"`: say so."""

    text: str

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        step.notes.append(self.text or rule.text)
        return True


@dataclass(frozen=True, slots=True)
class SetField(RuleAction):
    """`label.field = value`: set a scheduled field from this step on."""

    fields: Fields
    name: str
    value: Value

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        value = self.value(step.clock, values)
        if not math.isfinite(value):
            step.notes.append(
                f"{self.name} stays as it is, because its value is {value}: {rule.text}"
            )
            return False
        return self.fields.set(self.name, value, step, rule.text)


@dataclass(frozen=True, slots=True)
class Switch(RuleAction):
    """`open label` and `close label`: let a clause act or not, from this step on."""

    switches: Switches
    clause: str
    opens: bool

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        return self.switches.switch(self.clause, self.opens, step, rule.text)


@dataclass(frozen=True, slots=True)
class Freeze(RuleAction):
    """`freeze selector` and `unfreeze selector`, from this step on; `text` is the selector."""

    frozen: Frozen
    names: Sequence[str]
    freezes: bool
    text: str

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        return self.frozen.freeze(self.names, self.freezes, self.text, step, rule.text)


def round_to_micro_batches(wanted: float, present: int, micro: int) -> int:
    """Round a wanted batch size to whole micro-batches, towards the current size; at least one micro-batch."""
    if wanted >= present:
        return max(present, math.floor(wanted / micro + ROUNDING) * micro)
    return min(present, round_up(wanted, micro))


@dataclass(frozen=True, slots=True)
class SetBatch(RuleAction):
    """`batch = value`: set the batch in whole micro-batches; a size that is not finite changes nothing.

    It is rounded towards the present batch, never past the wanted size. Where that, or its value, leaves the
    batch as it is, a note says so once.
    """

    value: Value

    def perform(self, step: Step, values: Values, rule: Acting) -> bool:
        wanted = self.value(step.clock, values)
        if not math.isfinite(wanted):
            if not rule.rounding_noted:
                rule.rounding_noted = True
                step.notes.append(
                    f"batch stays as it is, because its value is {wanted}: {rule.text}"
                )
            return False
        size = round_to_micro_batches(wanted, step.batch_size, step.micro_size or 1)
        if size != step.batch_size:
            step.notes.append(f"batch {step.batch_size} -> {size} samples: {rule.text}")
            step.batch_size = size
        elif wanted != size and not rule.rounding_noted:
            rule.rounding_noted = True
            step.notes.append(
                f"batch stays at {size} samples: {wanted:.6g} samples were rounded to micro-batches of"
                f" {step.micro_size}: {rule.text}"
            )
        return True
