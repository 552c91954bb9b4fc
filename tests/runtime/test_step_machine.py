"""The step machine: the phases it runs, and what surrounds the passes of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import trainc
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.around import Around, Gradients, KeptWeights
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Step


class Note(Action):
    """Appends its name to a list."""

    def __init__(self, phase: Phase, log: list[str]) -> None:
        self.phase, self.name, self.log = phase, phase.name.lower(), log

    def run(self, step: Step) -> None:
        self.log.append(self.name)


class Surround(Around):
    """Appends to a list that it is entered and left."""

    def __init__(self, name: str, log: list[str], gate: Gate | None = None) -> None:
        self.name, self.log, self.gate = name, log, gate

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        self.log.append(f"enter {self.name}")
        try:
            yield
        finally:
            self.log.append(f"leave {self.name}")


no_gradients: Any = None
"""Nobody asks for them here."""


def machine(*actions: Action) -> StepMachine:
    return StepMachine(actions, Clock(), {})


def test_every_phase_it_takes_is_run_in_order() -> None:
    log: list[str] = []
    taken = [phase for phase in Phase if phase not in (Phase.FORWARD, Phase.BACKWARD)]
    made = machine(*(Note(phase, log) for phase in reversed(taken)), Surround("around", log))
    step = made.begin()
    assert log == ["batch", "rates", "perturb"]
    with made.surround(step, no_gradients):
        log.append("passes")
    made.finish()
    assert log[3:6] == ["enter around", "passes", "leave around"]
    assert log[:3] + log[6:] == [phase.name.lower() for phase in taken]


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
def test_an_action_in_a_phase_that_is_not_run_is_refused(phase: Phase) -> None:
    name = phase.name.lower()
    said = f"the action `{name}` is in phase `{name}`, in which a step runs the model and no action: put it in"
    with pytest.raises(ValueError, match=said):
        machine(Note(phase, []))


class Misplaced(Construct):
    """Has an action that would never run."""

    kind = "observe"
    name = "misplaced"
    cite = "-"
    effects = (Effect("forward", "note"),)

    def lower(self, to: Lowering) -> None:
        to.action(Note(Phase.FORWARD, []))


def test_a_construct_with_such_an_action_is_an_error_of_the_plan() -> None:
    base = trainc.check("loss mse optimizer sgd { lr = 0.1 }").spec
    assert base is not None
    with pytest.raises(trainc.SpecError, match="is in phase `forward`, in which a step runs"):
        trainc.plan(Spec((*base.clauses, Clause(Misplaced()))), nn.Linear(2, 2))


def test_a_step_that_could_not_be_prepared_is_not_open() -> None:
    log: list[str] = []

    class Fails(Note):
        def run(self, step: Step) -> None:
            super().run(step)
            if log.count("rates") == 1:
                raise ValueError("no rate")

    by = machine(Fails(Phase.RATES, log), Note(Phase.PERTURB, log))
    with pytest.raises(ValueError, match="no rate"):
        by.begin()
    by.begin()
    assert log == ["rates", "rates", "perturb"]


def test_what_is_around_is_entered_in_order_and_left_in_reverse() -> None:
    log: list[str] = []
    made = machine(Surround("a", log), Surround("b", log))
    with made.surround(made.begin(), no_gradients):
        log.append("passes")
    assert log == ["enter a", "enter b", "passes", "leave b", "leave a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_it_is_left_on_every_way_out(error: type[BaseException]) -> None:
    log: list[str] = []
    made = machine(Surround("a", log), Surround("b", log))
    with pytest.raises(error), made.surround(made.begin(), no_gradients):
        raise error
    assert log[2:] == ["leave b", "leave a"]
    made.check_outside("state_dict")


def test_the_first_is_left_where_the_second_cannot_be_entered() -> None:
    class Broken(Surround):
        def surround(self, step: Step, gradients: Gradients) -> Any:
            raise ValueError("broken")

    log: list[str] = []
    made = machine(Surround("a", log), Broken("b", log))
    with pytest.raises(ValueError, match="broken"), made.surround(made.begin(), no_gradients):
        log.append("passes")
    assert log == ["enter a", "leave a"]


def test_its_gate_is_obeyed() -> None:
    log: list[str] = []
    made = machine(Surround("a", log, Gate(every=TimeSpan(2, "steps"))))
    for _ in range(4):
        with made.surround(made.begin(), no_gradients):
            log.append("passes")
        made.finish()
    assert log.count("passes") == 4
    assert log.count("enter a") == log.count("leave a") == 2


def test_no_state_is_given_out_inside() -> None:
    made = machine(Surround("a", []))
    said = "`state_dict` was called inside a step, while `a` holds the weights at other values"
    with made.surround(made.begin(), no_gradients), pytest.raises(RuntimeError, match=said):
        made.state_dict()
    made.state_dict()


def test_it_cannot_be_run_as_an_action() -> None:
    with pytest.raises(TypeError, match="it is entered, not run"):
        Surround("a", []).run(Step(Clock(), {}, machine().signals, 0, 0))


def test_kept_weights_are_restored_bit_for_bit_even_when_interrupted() -> None:
    weights = [torch.randn(3), torch.randn(2, 2)]
    before = [w.clone() for w in weights]

    class Pressed(KeptWeights):
        """Is interrupted after the first of the weights, once."""

        presses = 0

        def _restore(self) -> None:
            if not self.presses:
                self.presses = 1
                self._tensors[0].copy_(self._copies[0])
                raise KeyboardInterrupt
            super()._restore()

    pressed = Pressed(weights)
    pressed.__enter__()
    for weight in weights:
        weight.add_(1e3)
    with pytest.raises(KeyboardInterrupt):
        pressed.__exit__()
    assert all(map(torch.equal, weights, before))
