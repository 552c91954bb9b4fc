"""The step machine: runs the actions of one optimizer step in the order of their phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action, IncompatibleState, Phase, StopRun, check_phase
from trainc.runtime.step.around import Around, Gradients
from trainc.runtime.step.batches import BatchTransform
from trainc.runtime.step.gradients import paused_in
from trainc.runtime.step.optimizer import OptimizerStep, Rates
from trainc.runtime.step.record import KeepsOptimizerState, Preconditioner, Signals, Step
from trainc.runtime.storage.form import reading
from trainc.runtime.torch_optimizer.nested import copied


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
        self._figures = [(action, name) for action in self.actions for name in action.figures]
        self._choose_batch = [a for a in self.actions if a.phase == Phase.BATCH]
        self.around = tuple(a for a in self.actions if isinstance(a, Around))
        """What surrounds the passes of a step."""
        self.batch_transforms = tuple(a for a in self.actions if isinstance(a, BatchTransform))
        """What changes each micro-batch before its first pass."""
        self._optimizers = tuple(a for a in self.actions if isinstance(a, OptimizerStep))
        self._before = [
            a
            for a in self.actions
            if Phase.BATCH < a.phase < Phase.FORWARD and not isinstance(a, Around | BatchTransform)
        ]
        self._after = [a for a in self.actions if a.phase > Phase.BACKWARD]
        self.clock, self.parameters = clock, parameters
        self.signals = Signals() if signals is None else signals
        # Set by the program; a machine alone has no other processes.
        self.equals: Callable[[], ReplicaGroup | None] = lambda: None
        self.batch_size = self.first_batch = self.micro_size = 0
        self.current: Step | None = None
        self._undecided: dict[str, Any] = {}
        """Signals, figures, batch size and the states of what chooses it, from before the open step."""
        self.decided: dict[int, Mapping[str, int]] = {}
        """What was decided in steps, by their numbers, which count from 1."""
        self.ended: str | None = None
        """Why no step can be opened any more; None while one can."""
        self._inside: str | None = None
        self._updated = False
        self._preconditioners = [a.preconditioner for a in actions if isinstance(a, Preconditioner)]
        keeping = [action for action in actions if isinstance(action, KeepsOptimizerState)]
        self._optimizer_states = [action.state_of for action in keeping]
        self._forget_states = [action.forget for action in keeping]
        self._first_states = [action.first_state for action in keeping]

    def set_sizes(self, batch: int, micro: int) -> None:
        """Set the samples of the first step, and of a micro-batch."""
        self.batch_size = self.first_batch = batch
        self.micro_size = micro

    def add(self, action: Action, *, first: bool = False) -> None:
        """Add an action without state after the backward pass, last of its phase or `first`."""
        every = (action, *self.actions) if first else (*self.actions, action)
        self.actions = tuple(sorted(every, key=lambda one: one.phase))
        self._after = [a for a in self.actions if a.phase > Phase.BACKWARD]

    def begin(self) -> Step:
        """Open a step unless one is open; run the actions before the forward pass.

        Raises RuntimeError when the training was ended.
        """
        if self.ended is not None:
            raise RuntimeError(self.ended)
        if self.current is None:
            self.current = Step(
                self.clock,
                self.parameters,
                self.signals,
                self.batch_size,
                self.micro_size,
                after_update=self._updated,
                preconditioners=self._preconditioners,
                optimizer_states=self._optimizer_states,
                forget_states=self._forget_states,
                first_states=self._first_states,
                equals=self.equals,
                recorded=self.decided.get(self.clock.steps + 1, {}),
            )
            self._undecided = self._decided_so_far()
            try:
                self._prepare(self.current)
            except StopRun as stop:
                stop.notes, self.current = tuple(self.current.notes), None
                raise
            except BaseException:
                self.discard_step()  # the next call prepares its step anew
                raise
        return self.current

    def _decided_so_far(self) -> dict[str, Any]:
        """Return what the first actions of a step change, to be given back where it is discarded."""
        return {
            "signals": dict(self.signals),
            "batch_size": self.batch_size,
            "actions": {action.name: action.state_dict() for action in self._choose_batch},
            "figures": [
                list(found) if isinstance(found := getattr(action, name), list) else found
                for action, name in self._figures
            ],
        }

    def _prepare(self, step: Step) -> None:
        """Choose the batch size, and run the other actions before the forward pass."""
        self._set_size_signals(self.batch_size)
        if self._choose_batch:
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
        """Raise RuntimeError inside `surround`, where weights are not those of the training, and when it was ended."""
        if self.ended is not None:
            raise RuntimeError(self.ended)
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
        self._updated = True
        self._count(step)
        self.current = None
        return step

    def _count(self, step: Step) -> None:
        """Advance the clock, and let rules and schedules see what happened."""
        self.clock.advance(samples=step.samples, tokens=step.tokens, seconds=0.0)
        if step.decided:
            self.decided[self.clock.steps] = step.decided
        self.signals["loss"] = step.loss
        if "gradient_norm" in step.metrics:
            self.signals["gradient_norm"] = step.metrics["gradient_norm"]

    def discard_step(self) -> None:
        """Close the open step as if it had never begun: rules and policies decide anew in the next one."""
        if self.current is not None:
            self._set_shared(self._undecided)
            for (shown, name), value in zip(self._figures, self._undecided["figures"], strict=True):
                setattr(shown, name, _copied(value))
            for action in self._choose_batch:
                action.load_state_dict(self._undecided["actions"][action.name])
        self.current = None

    def skip_step(self, step: Step) -> None:
        """Close the step without an update, but count it; other replicas wait for its turn of phase 11."""
        self.current = None
        self._run(step, [action for action in self._after if action.phase == Phase.EXCHANGE])
        self._count(step)

    def state_dict(self) -> dict[str, Any]:
        self.check_outside("state_dict")
        states = {action.name: action.state_dict() for action in self.actions}
        before = self._decided_so_far() if self.current is None else self._undecided
        states |= before["actions"]
        figures: dict[str, dict[str, Any]] = {}
        for (action, name), value in zip(self._figures, before["figures"], strict=True):
            figures.setdefault(action.name, {})[name] = _copied(value)
        return {
            "clock": self.clock.state_dict(),
            "signals": dict(before["signals"]),
            "batch_size": before["batch_size"],
            "actions": {name: state for name, state in states.items() if state},
            "figures": figures,
            "rates": {**self._rates(), **paused_in(self.actions)},
            "optimizers": {one.name: one.describe() for one in self._optimizers},
        }

    def require_savable(self) -> None:
        """Raise OptimizerProblem where an optimizer has state that no checkpoint can hold."""
        for action in self._optimizers:
            action.named.require_savable()

    def scheduled_rates(self, clock: Clock) -> dict[str, float]:
        """Return the rate that each optimizer's schedule gives at a clock, without factors."""
        return {a.optimizer.name: a.base(clock) for a in self.actions if isinstance(a, Rates)}

    def _rates(self) -> dict[str, dict[str, float]]:
        """Return the rates of schedules, and those of the last step by parameter, with all factors; none before it."""
        found: dict[str, float] = {}
        for action in self._optimizers if self.clock.steps else ():
            for _, options, slots in action.in_groups():
                found |= {slot.name: float(options["lr"]) for slot in slots}
        return {"schedules": self.scheduled_rates(self.clock), "in_force": found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if unknown := self._unknown_actions(state):
            raise ValueError(
                f"the checkpoint has state of {', '.join(unknown)}, but this program has no such actions"
            )
        for name, why in self.other_optimizers(state):
            raise ValueError(f"no part of the state of the optimizer `{name}` fits: {why}")
        self._load_shared(state)
        for action in self.actions:
            with reading(f"actions/{action.name}", "what this action keeps"):
                action.load_state_dict(state["actions"].get(action.name, {}))
        self._load_figures(state["figures"])
        self._load_rates(state)

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Load the parts of another program's state that still hold; return lines on what restarts or is dropped.

        Raises IncompatibleState where an action cannot load its state, not even in part.
        """
        self._load_shared(state)
        lines: list[str | None] = [
            f"{name}: no longer in the program" for name in self._unknown_actions(state)
        ]
        others = dict(self.other_optimizers(state))
        lines += [f"{name}: starts anew, because {why}" for name, why in others.items()]
        for action in self.actions:
            own = {} if action.name in others else state["actions"].get(action.name, {})
            try:
                with reading(f"actions/{action.name}", "what this action keeps"):
                    lines.append(action.load_compatible(own))
            except ValueError as error:
                raise IncompatibleState(str(error)) from error
        self._load_figures(state["figures"])
        self._load_rates(state)
        return [line for line in lines if line]

    def keep(self) -> Callable[[], None]:
        """Return what puts back the state of now, in which no step is open."""
        shared = copied(
            self._decided_so_far() | {"clock": self.clock.state_dict()}, torch.clone, {}
        )
        optimizers = [(one, dict(vars(one))) for one in self._optimizers]
        others = [action for action in self.actions if action not in self._optimizers]
        states = [(one, copied(one.state_dict(), torch.clone, {})) for one in others]
        updated = self._updated

        def put_back() -> None:
            self._load_shared(shared)
            self._updated = updated
            for one, before in optimizers:
                vars(one).clear()
                vars(one).update(before)
            for action, state in states:
                action.load_state_dict(state)
            for (action, name), value in zip(self._figures, shared["figures"], strict=True):
                setattr(action, name, _copied(value))

        return put_back

    def other_optimizers(self, state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the optimizers that a state fits in no part, each with the reason."""
        for one in self._optimizers:
            if (before := state["optimizers"].get(one.name)) is not None:
                own = state["actions"].get(one.name, {})
                if (why := one.cannot_continue(before, own)) is not None:
                    yield one.name, why

    def _load_rates(self, state: Mapping[str, Any]) -> None:
        """Put the rates of the last step in force: until the next one they are those of the state."""
        for one in self._optimizers:
            one.restore_rates(state["rates"]["in_force"])

    def _load_figures(self, saved: Mapping[str, Any]) -> None:
        """Restore what only summaries show."""
        for action, name in self._figures:
            if name in (found := saved.get(action.name, {})):
                setattr(action, name, _copied(found[name]))

    def _unknown_actions(self, state: Mapping[str, Any]) -> list[str]:
        """Return the names of actions that have saved state and are not in this program."""
        return sorted(set(state["actions"]) - {action.name for action in self.actions})

    def _load_shared(self, state: Mapping[str, Any]) -> None:
        """Restore clock, signals and batch size; a step that is open is no longer."""
        self.current, self._updated = None, False
        self.clock.load_state_dict(state["clock"])
        self._set_shared(state)

    def _set_shared(self, state: Mapping[str, Any]) -> None:
        self.signals.clear()
        self.signals.update(state["signals"])
        self.batch_size = int(state["batch_size"])

    def _run(self, step: Step, actions: Sequence[Action]) -> None:
        for action in actions:
            if action.is_due(step):
                action.run_in(step)


def _copied(figure: Any) -> Any:
    """Return a figure as it is now: a number, or a copy of a list."""
    return list(figure) if isinstance(figure, list) else figure
