"""The step machine: runs the actions of one optimizer step in phase order and keeps what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, IncompatibleState, Phase
from trainc.runtime.step.record import Preconditions, Signals, Step

if TYPE_CHECKING:
    from torch.nn import Parameter

    from trainc.runtime.schedule.clock import Clock


class StepMachine:
    """Runs actions by phase; `begin` opens a step (phases 1 to 3), `finish` closes it (6 to 12)."""

    def __init__(
        self,
        actions: Sequence[Action],
        clock: Clock,
        parameters: Mapping[str, Parameter],
        signals: Signals | None = None,
    ) -> None:
        self.actions = tuple(sorted(actions, key=lambda action: action.phase))
        names = [action.name for action in self.actions]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"two actions share a name: {', '.join(sorted(repeated))}")
        # Chosen once: a step of a small model is short, and this is on its way.
        self._rules = [a for a in self.actions if a.phase == Phase.BATCH]
        self._before = [a for a in self.actions if Phase.BATCH < a.phase < Phase.FORWARD]
        self._after = [a for a in self.actions if a.phase > Phase.BACKWARD]
        self.clock = clock
        self.parameters = parameters
        self.signals = Signals() if signals is None else signals
        self.batch_size = 0
        self.micro_size = 0
        self.current: Step | None = None
        self._preconditioners = [
            action.preconditioner for action in actions if isinstance(action, Preconditions)
        ]

    def begin(self) -> Step:
        """Open a step if none is open and run what comes before the forward pass."""
        if self.current is None:
            self.current = Step(
                self.clock, self.parameters, self.signals, self.batch_size, self.micro_size
            )
            self.current.preconditioners = self._preconditioners
            self._tell_sizes(self.batch_size)
            self._run(self.current, self._rules)
            if self.current.batch_size != self.batch_size:
                self.batch_size = self.current.batch_size
                self._tell_sizes(self.batch_size)
            self._run(self.current, self._before)
        return self.current

    def _tell_sizes(self, batch: int) -> None:
        """Let expressions read the step's number and sizes beside what was measured."""
        signals = self.signals
        signals["batch"], signals["micro_batch"] = float(batch), float(self.micro_size)
        signals["step"] = float(self.clock.steps)

    def finish(self) -> Step:
        """Run what follows the backward pass, advance the clock and close the step."""
        step = self.current
        if step is None:
            raise RuntimeError(
                "nothing to update: call `program.loss(batch)` and its `backward()` first"
            )
        self._run(step, self._after)
        self.clock.advance(samples=step.samples, tokens=step.tokens, seconds=0.0)
        self.signals["loss"] = step.loss
        self.current = None
        return step

    def discard_step(self) -> None:
        """Close the open step without an update."""
        self.current = None

    def state_dict(self) -> dict[str, Any]:
        states = {action.name: action.state_dict() for action in self.actions}
        return {
            "clock": self.clock.state_dict(),
            "signals": dict(self.signals),
            "batch_size": self.batch_size,
            "actions": {name: state for name, state in states.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        foreign = self._foreign(state)
        if foreign:
            raise ValueError(
                f"the checkpoint has state of {', '.join(foreign)}, which this program does not run"
            )
        self._load(state)
        for action in self.actions:
            action.load_state_dict(state["actions"].get(action.name, {}))

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Restore what fits of the state of a program with other actions; return what does not go on."""
        self._load(state)
        foreign = self._foreign(state)
        told = [f"{name}: not in the program any more" for name in foreign]
        for action in self.actions:
            try:
                told.append(action.load_compatible(state["actions"].get(action.name, {})) or "")
            except ValueError as error:
                raise IncompatibleState(str(error)) from error
        return list(filter(None, told))

    def _foreign(self, state: Mapping[str, Any]) -> list[str]:
        """Return the names of actions that the state is of and this does not run."""
        return sorted(set(state["actions"]) - {action.name for action in self.actions})

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore what is no action's own."""
        self.clock.load_state_dict(state["clock"])
        self.signals.clear()
        self.signals.update(state["signals"])
        self.batch_size = int(state["batch_size"])

    def _run(self, step: Step, actions: Sequence[Action]) -> None:
        for action in actions:
            if action.gate is None or action.gate.fires(self.clock):
                action.run(step)
