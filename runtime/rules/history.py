"""What rules know of the past: the best value of a number, how long ago it was, and means over the last steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.rules.actions import Value
from trainc.runtime.rules.fields import Fields
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import AnyNumber, Anything, Form, Number, Record

State = dict[str, Any]


class Memory(ABC):
    """Remembers one number of the run, which it is shown once in each step; NaN is a number that is not known."""

    text: str
    """How the spec writes it: `mean(loss, 100 steps)`."""
    value: Value

    @abstractmethod
    def see(self, now: float, clock: Clock) -> None:
        """Take in the number of the step that begins, in place of one that it was shown at the same step."""

    @abstractmethod
    def state(self) -> State:
        """Return what it remembers: tensors and JSON scalars."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave; an empty one is that of the start."""


@dataclass(eq=False)
class Best(Memory):
    """The lowest value so far, and the step at which it was first seen."""

    text: str
    value: Value
    lowest: float = field(default=math.nan, init=False)
    step: float = field(default=math.nan, init=False)

    def see(self, now: float, clock: Clock) -> None:
        if now < self.lowest or (math.isnan(self.lowest) and not math.isnan(now)):
            self.lowest, self.step = now, float(clock.steps)

    def state(self) -> State:
        return {} if math.isnan(self.lowest) else {"lowest": self.lowest, "step": self.step}

    def load(self, state: Mapping[str, Any]) -> None:
        self.lowest = float(state.get("lowest", math.nan))
        self.step = float(state.get("step", math.nan))


@dataclass(eq=False)
class Window(Memory):
    """The values of the steps in the last `span`; their mean is known when there were values for as long as that."""

    text: str
    value: Value
    span: TimeSpan
    values: array[float] = field(default_factory=lambda: array("d"), init=False)
    places: array[float] = field(default_factory=lambda: array("d"), init=False)
    begun: float = field(default=math.nan, init=False)
    """Where the step lay that gave the first value."""
    seen_at: int = field(default=-1, init=False)

    def see(self, now: float, clock: Clock) -> None:
        place, span = clock.position(self.span)
        if self.seen_at == clock.steps:
            self.values.pop()
            self.places.pop()
        if math.isnan(now):
            self.seen_at = -1
        else:
            self.seen_at = clock.steps
            self.values.append(now)
            self.places.append(place)
            if math.isnan(self.begun):
                before = clock.before
                self.begun = 0.0 if before is None else before.position(self.span)[0]
        old = next((i for i, one in enumerate(self.places) if one > place - span), len(self.places))
        del self.values[:old], self.places[:old]

    def mean(self, clock: Clock) -> float:
        """Return the mean; NaN before the values go back as far as the span."""
        place, span = clock.position(self.span)
        if not self.values or not self.begun <= place - span:
            return math.nan
        try:
            return math.fsum(self.values) / len(self.values)
        except (OverflowError, ValueError):  # infinities of one sign, or of both
            return sum(self.values)

    def state(self) -> State:
        if math.isnan(self.begun):
            return {}
        held = {"values": _tensor(self.values), "places": _tensor(self.places)}
        return {"begun": self.begun, "seen_at": self.seen_at, **held}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, held in (("values", self.values), ("places", self.places)):
            del held[:]
            held.extend(state[name].tolist() if name in state else ())
        self.begun = float(state.get("begun", math.nan))
        self.seen_at = int(state.get("seen_at", -1))


def _tensor(values: array[float]) -> Tensor:
    """Return a copy, float64 (values,); this runs in every step."""
    if not values:
        return torch.empty(0, dtype=torch.float64)
    return torch.frombuffer(bytearray(values.tobytes()), dtype=torch.float64)


_PARTS: Mapping[str, Form] = {
    "lowest": AnyNumber(), "step": Number(), "begun": Number(), "seen_at": Number(),
    "values": Anything(), "places": Anything(),
}  # fmt: skip


@dataclass(eq=False)
class History(Action):
    """Phase 1, before the rules: shows every number that rules remember what it is in the step that begins."""

    fields: Fields
    memories: dict[str, Memory] = field(default_factory=dict, init=False)
    """By their text, each after those that it reads."""
    phase = Phase.BATCH
    name = "history of rules"

    def run(self, step: Step) -> None:
        for memory in self.memories.values():
            memory.see(memory.value(step.clock, self.fields.values_at(step)), step.clock)

    def state_dict(self) -> ActionState:
        return {
            f"{text}/{name}": value
            for text, memory in self.memories.items()
            for name, value in memory.state().items()
        }

    def state_form(self) -> Form:
        entries = ((text, part) for text in self.memories for part in _PARTS.items())
        return Record(optional={f"{text}/{name}": form for text, (name, form) in entries})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for text, memory in self.memories.items():
            start = f"{text}/"
            own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            memory.load(own)
