"""The step machine: runs the actions of one optimizer step in the order of their phases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn import Parameter

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action, IncompatibleState, Phase, check_phase
from trainc.runtime.step.around import Around, Gradients
from trainc.runtime.step.record import KeepsOptimizerState, Preconditioner, Signals, Step


class StepMachine:
    """Runs actions by phase; `begin` opens a step (phases 1 to 3), `finish` closes it (6 to 12).

    In phases 4 and 5 the model runs, between the two halves of what surrounds the passes.
    """

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
            raise ValueError(f"two actions have the same name: {', '.join(sorted(repeated))}")
        for action in self.actions:
            check_phase(action)
        # Chosen once: this runs in every step, and a step of a small model is short.
        self._choose_batch = [a for a in self.actions if a.phase == Phase.BATCH]
        self.around = tuple(a for a in self.actions if isinstance(a, Around))
        """What surrounds the passes of a step."""
        self._before = [
            a
            for a in self.actions
            if Phase.BATCH < a.phase < Phase.FORWARD and not isinstance(a, Around)
        ]
        self._after = [a for a in self.actions if a.phase > Phase.BACKWARD]
        self.clock = clock
        self.parameters = parameters
        self.signals = Signals() if signals is None else signals
        self.batch_size = 0
        self.micro_size = 0
        self.current: Step | None = None
        self._inside: str | None = None
        self._preconditioners = [
            action.preconditioner for action in actions if isinstance(action, Preconditioner)
        ]
        self._optimizer_states = [
            action.state_of for action in actions if isinstance(action, KeepsOptimizerState)
        ]

    def begin(self) -> Step:
        """Open a step unless one is open; run the actions before the forward pass."""
        if self.current is None:
            self.current = Step(
                self.clock, self.parameters, self.signals, self.batch_size, self.micro_size
            )
            self.current.preconditioners = self._preconditioners
            self.current.optimizer_states = self._optimizer_states
            try:
                self._prepare(self.current)
            except BaseException:
                self.current = None  # the next call prepares its step anew
                raise
        return self.current

    def _prepare(self, step: Step) -> None:
        """Choose the batch size, and run the other actions before the forward pass."""
        self._set_size_signals(self.batch_size)
        self._run(step, self._choose_batch)
        if step.batch_size != self.batch_size:
            self.batch_size = step.batch_size
            self._set_size_signals(self.batch_size)
        self._run(step, self._before)

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Enter what surrounds the passes of this step, in order; leave it on every way out of the block."""
        try:
            with ExitStack() as entered:
                for action in self.around:
                    if action.is_due(step):
                        self._inside = action.name
                        entered.enter_context(action.surround(step, gradients))
                yield
        finally:
            self._inside = None

    def check_outside(self, what: str) -> None:
        """Raise RuntimeError inside `surround`, where weights are not those of the training."""
        if self._inside is not None:
            raise RuntimeError(
                f"`{what}` was called inside a step, while `{self._inside}` holds the weights at other values: call it"
                " after `program.step` has returned"
            )

    def _set_size_signals(self, batch: int) -> None:
        """Set the signals `batch`, `micro_batch` and `step`."""
        signals = self.signals
        signals["batch"], signals["micro_batch"] = float(batch), float(self.micro_size)
        signals["step"] = float(self.clock.steps)

    def finish(self) -> Step:
        """Run the actions after the backward pass, advance the clock and close the step; RuntimeError without one."""
        step = self.current
        if step is None:
            raise RuntimeError(
                "no step is open: call `program.loss(batch)` and its `backward()` before `update()`"
            )
        self._run(step, self._after)
        self.clock.advance(samples=step.samples, tokens=step.tokens, seconds=0.0)
        self.signals["loss"] = step.loss
        self.current = None
        return step

    def discard_step(self) -> None:
        """Close the open step without an update."""
        self.current = None

    def exchange(self, step: Step) -> None:
        """Run the actions of phase 11 alone: the turn of a step without an update, for which other replicas wait."""
        self._run(step, [action for action in self._after if action.phase == Phase.EXCHANGE])

    def state_dict(self) -> dict[str, Any]:
        self.check_outside("state_dict")
        states = {action.name: action.state_dict() for action in self.actions}
        return {
            "clock": self.clock.state_dict(),
            "signals": dict(self.signals),
            "batch_size": self.batch_size,
            "actions": {name: state for name, state in states.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        unknown = self._unknown_actions(state)
        if unknown:
            raise ValueError(
                f"the checkpoint has state of {', '.join(unknown)}, but this program has no such actions"
            )
        self._load_shared(state)
        for action in self.actions:
            action.load_state_dict(state["actions"].get(action.name, {}))

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Load the parts of another program's state that still hold; return lines on what restarts or is dropped.

        Raises IncompatibleState where an action cannot load its state, not even in part.
        """
        self._load_shared(state)
        lines: list[str | None] = [
            f"{name}: no longer in the program" for name in self._unknown_actions(state)
        ]
        for action in self.actions:
            try:
                lines.append(action.load_compatible(state["actions"].get(action.name, {})))
            except ValueError as error:
                raise IncompatibleState(str(error)) from error
        return [line for line in lines if line]

    def _unknown_actions(self, state: Mapping[str, Any]) -> list[str]:
        """Return the names of actions that have saved state and are not in this program."""
        return sorted(set(state["actions"]) - {action.name for action in self.actions})

    def _load_shared(self, state: Mapping[str, Any]) -> None:
        """Restore clock, signals and batch size."""
        self.clock.load_state_dict(state["clock"])
        self.signals.clear()
        self.signals.update(state["signals"])
        self.batch_size = int(state["batch_size"])

    def _run(self, step: Step, actions: Sequence[Action]) -> None:
        for action in actions:
            if action.is_due(step):
                action.run(step)
