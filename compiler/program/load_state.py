"""Loading the state of a program: all of it is checked before anything changes, and an error leaves all as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.execution.evaluations import Evaluations
from trainc.compiler.execution.execution import Execution
from trainc.compiler.model.undisturbed import own_generators
from trainc.compiler.plan.identity import batch_is_stale, differences, identity_of
from trainc.compiler.program.save import SavableProgram
from trainc.compiler.program.step_runner import StepRunner
from trainc.compiler.program.step_totals import TermHistory
from trainc.compiler.structure.wrappers import Unwrapped
from trainc.runtime.memory.fitting import FittingSize
from trainc.runtime.processes.sharded import is_sharded, shard_state
from trainc.runtime.run.interface import RunSettings
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.storage.clock_form import check_clock
from trainc.runtime.storage.differences import Difference, check_differences
from trainc.runtime.storage.form import (
    AnyNumber,
    Anything,
    Count,
    Flag,
    Form,
    ListOf,
    Number,
    Optional,
    Plain,
    Record,
    StateProblem,
    Text,
    Values,
    reading,
)


@dataclass(frozen=True)
class Parts:
    """What of a program has state."""

    module: nn.Module
    machine: StepMachine
    execution: Execution
    history: TermHistory
    fitting: Mapping[str, FittingSize]
    """The numbers of samples that fit into memory, by their names in a state."""


_PAIR = ListOf(Plain())
_IDENTITY = {
    "format": Count(),
    "plan": Text(),
    "fingerprint": Plain(),
    "model": Text(),
    "signature": ListOf(_PAIR),
    "clauses": ListOf(Record(more=Plain())),
    "rules": ListOf(Record(more=Plain())),
    "units": Record(more=Plain()),
}
_PARTS = (
    "made_by", "model", "history", "execution", "clock", "signals", "batch_size", "actions", "figures", "rates",
    "optimizers",
)  # fmt: skip
_COMPILED = {
    "known": ListOf(Text()),
    "repeated": Count(),
    "refused": Optional(Text()),
    "covered": Flag(),
    "watched": Flag(),
}
_TERMS = Record(more=AnyNumber())
_SKIPPED = Record({name: Count() for name in ("unsound", "in_row", "overflowed")})

_FITTING = Record({"size": Count(1), "failed": Count(1), "step": Count()})


def check_shared(state: Mapping[str, Any], machine: StepMachine) -> None:
    """Raise StateProblem unless a state has what all states have: all but weights and the states of actions."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of a program is a dict, and this is {type(state).__name__}")
    if missing := [key for key in _PARTS if key not in state]:
        raise ValueError(
            f"this is no state of a program: it has no `{missing[0]}`. {_instead(state)}"
        )
    size = Count(1 if machine.first_batch else 0)
    optimizer = Record({"class": Text(), "size": Count()})
    rates = {"schedules": _TERMS, "in_force": Record(more=Number())}
    Record(
        {
            "made_by": Record(_IDENTITY),
            "model": Record(more=Anything()),
            "history": Record({"first": _TERMS, "last": _TERMS, "skipped": _SKIPPED}),
            "execution": Record(
                {
                    "reasons": Record(more=Text()),
                    "refused": Optional(ListOf(Text(), 2)),
                    "generators": ListOf(Anything()),
                },
                {"compiled": Record(_COMPILED)},
            ),
            "clock": Record(more=Anything()),
            "signals": _TERMS,
            "batch_size": size,
            "actions": Record(more=Record(more=Anything())),
            "figures": Record(more=Record(more=Plain())),
            "rates": Record(rates, {"paused": ListOf(Text())}),
            "optimizers": Record(more=optimizer),
        },
        {
            "evaluation": Record(more=Anything()),
            "fitting": Optional(_FITTING),
            "fitting_evaluation": _FITTING,
        },
    ).check(state, "")
    check_clock(state["clock"], "clock")


def _instead(state: Mapping[str, Any]) -> str:
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return (
            "It holds tensors alone, as a model's does: for weights without the rest of a program write"
            " `program.module.load_state_dict(state)`"
        )
    if "program" in state:
        return "It is a whole checkpoint: give its entry `program`"
    return "Give what `program.state_dict()` returned"


def check_state(state: Mapping[str, Any], parts: Parts, accept: bool, on_nan: str) -> None:
    """Raise StateProblem where weights or the states of actions do not fit; with `accept` other clauses may."""
    now = Unwrapped(parts.module).state_dict()
    trains = {name for name, p in parts.module.named_parameters(remove_duplicate=False)}
    finite = trains if on_nan != "continue" else set()
    weights = {
        name: Values.like(value, finite=name in finite) if isinstance(value, Tensor) else Anything()
        for name, value in now.items()
    }
    Record(weights).check(state["model"], "model")
    _check_evaluation(state, now)
    generators = [Values.like(one.get_state()) for one in own_generators(parts.module)]
    _check_generators(state["execution"]["generators"], generators)
    others = {name for name, _ in parts.machine.other_optimizers(state)}
    for action in parts.machine.actions:
        path, own = f"actions/{action.name}", state["actions"].get(action.name, {})
        if own and action.name not in others:
            action.state_form().check(own, path, accept)
        figures = {name: _figure(getattr(action, name)) for name in action.figures}
        if action.name in state["figures"]:
            path = f"figures/{action.name}"
            Record(figures).check(state["figures"][action.name], path, accept)


def _check_evaluation(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in state.get("evaluation", {}).items():
        path = f"evaluation/{name}"
        if not isinstance(now.get(name), Tensor):
            raise StateProblem(path, "a weight of the model", "none of them")
        shape = tuple(now[name].shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            Values.like(now[name]).check(value, path)


def _check_generators(found: list[Any], forms: list[Values]) -> None:
    path = "execution/generators"
    if len(found) != len(forms):
        raise StateProblem(
            path, f"the states of {len(forms)} random generators", f"{len(found)} of them"
        )
    for i, (value, form) in enumerate(zip(found, forms, strict=True)):
        form.check(value, f"{path}/{i}")


def _figure(now: Any) -> Form:
    """Return the form of a figure of a summary: of what the action has now."""
    if isinstance(now, bool):
        return Flag()
    if isinstance(now, list):
        return ListOf(Optional(AnyNumber()))
    return AnyNumber() if isinstance(now, int | float) else Plain()


def _sharded(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Return a whole state with what belongs to a sharded parameter sharded as it is; any other state as it is."""
    named = module.named_parameters(remove_duplicate=False)
    shards = {name: parameter for name, parameter in named if is_sharded(parameter)}
    if not shards:
        return state

    def placed(entries: Mapping[str, Any]) -> dict[str, Any]:
        owners = {key: next((n for n in key.split("/") if n in shards), None) for key in entries}
        return {
            key: value if (owner := owners[key]) is None else shard_state(value, shards[owner])
            for key, value in entries.items()
        }

    actions = {name: placed(entries) for name, entries in state["actions"].items()}
    return {**state, "model": placed(state["model"]), "actions": actions}


def load_parts(state: Mapping[str, Any], parts: Parts, accept: bool) -> list[str]:
    """Load a state that was checked; return lines on what restarts."""
    with reading("model", "the model's own state"):
        Unwrapped(parts.module).load_state_dict(state["model"])
    machine = parts.machine
    lost = (machine.load_compatible if accept else machine.load_state_dict)(state) or []
    parts.history.load_state_dict(state["history"])
    for name, size in parts.fitting.items():
        size.load_state_dict(state.get(name))
    with reading("execution", "what this program keeps of its executors"):
        parts.execution.load_state_dict(state["execution"], accept=accept)
    return lost


@contextmanager
def unchanged_on_error(parts: Parts) -> Iterator[None]:
    """Put back what the parts hold now where the block, in which no step is open, ends with an error."""
    weights = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in parts.module.state_dict().items()
    }
    history, execution = parts.history.state_dict(), parts.execution.state_dict()
    fitting = {name: size.state_dict() for name, size in parts.fitting.items()}
    put_back = parts.machine.keep()
    try:
        yield
    except BaseException:
        with torch.no_grad():
            parts.module.load_state_dict(weights)
        put_back()
        parts.history.load_state_dict(history)
        for name, size in parts.fitting.items():
            size.load_state_dict(fitting[name])
        parts.execution.load_state_dict(execution)
        raise


def rate_differences(machine: StepMachine, state: Mapping[str, Any]) -> list[Difference]:
    """Return the optimizers whose schedule gives another rate at the clock of a state than when it was made.

    What rules decided before holds on where rules of this program decide on it.
    """
    clock = Clock(
        samples_per_epoch=machine.clock.samples_per_epoch, replicas=machine.clock.replicas
    )
    clock.load_state_dict(state["clock"])
    decided = [(one, one.state_dict()) for one in machine.actions if one.outlasts_rollback]
    try:
        # What is damaged is named when the state is loaded.
        with suppress(ValueError, TypeError, AttributeError):
            for action, _ in decided:
                action.load_compatible(state["actions"].get(action.name, {}))
        rates = machine.scheduled_rates(clock)
    finally:
        for action, own in decided:
            action.load_state_dict(own)
    before = state["rates"]["schedules"]
    pairs = ((name, before.get(name, math.nan), rate) for name, rate in rates.items())
    told = "the next step of `{}` had learning rate {:.6g} and has {:.6g}, before factors"
    return [
        Difference(told.format(name, was, rate))
        for name, was, rate in pairs
        if all(map(math.isfinite, (was, rate))) and not math.isclose(was, rate, rel_tol=1e-9)
    ]


class LoadableProgram(SavableProgram):
    """Base of `Program`: how its state is compared and loaded."""

    settings: RunSettings
    _runner: StepRunner
    _evaluations: Evaluations

    def differences(self, state: Mapping[str, Any]) -> list[Difference]:
        """Return how the spec, model and rates that made a state differ from those of this program.

        Raises ValueError where the state is damaged, naming the entry.
        """
        check_shared(state, self._machine)
        with reading("made_by", "what made the state"):
            found = differences(state["made_by"], identity_of(self.plan))
        return found and [*found, *rate_differences(self._machine, state)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, and forget the open step if there is one.

        `evaluation` is derived from the rest: it is compared with the model, and not loaded.
        Raises ChangedRun, a ValueError, for a state that another spec or model made, and ValueError naming the entry
        that is damaged or does not fit, and what was expected. Then the program is as it was.
        """
        self._evaluation.check_outside("load_state_dict")
        self._load(state, accept=False)

    @property
    def rolls_back(self) -> bool:
        """Whether a rule of the spec says `rollback`."""
        acts = (act for rule in self.plan.spec["rules"] for act in rule["actions"])
        return any(act[:2] == ["do", "rollback"] for act in acts)

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned earlier in this training, as after `trainc.RollBack`.

        All is restored but what rules decided since: fields that they set, clauses that they switched, what they froze,
        and when they acted. Raises what `load_state_dict` raises.
        """
        actions = (action for action in self._machine.actions if action.outlasts_rollback)
        kept = [(action, action.state_dict()) for action in actions]
        self.load_state_dict(state)
        for action, decided in kept:
            action.load_state_dict(decided)

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Restore the state of another spec on the same model where it fits; return lines on what restarts.

        Raises ChangedRun, a ValueError, where the model has other parameters, and ValueError as `load_state_dict` does.
        """
        self._evaluation.check_outside("load_compatible")
        return self._load(state, accept=True)

    def _load(self, state: Mapping[str, Any], *, accept: bool) -> list[str]:
        check_differences(self.differences(state), accept)
        runner = self._runner
        sizes = {"fitting": runner.fitting, "fitting_evaluation": self._evaluations.size}
        parts = Parts(self.module, self._machine, self.execution, runner.history, sizes)
        check_state(state, parts, accept, on_nan=self.settings.on_nan)
        self._runner.discard_step()
        if self._runner.last is None:  # parameters may have been sharded since `compile`
            self.execution.follow_model(self._machine.actions, first_step=True)
        state = _sharded(state, self.module)
        with unchanged_on_error(parts):
            lost = load_parts(state, parts, accept)
            if (stale := batch_is_stale(state["made_by"], identity_of(self.plan))) is not None:
                self._machine.batch_size = first = self._machine.first_batch
                lost += [f"batch: {first} samples again, because {stale}"] if stale else []
            for mask in self._method.masks.values():
                mask.read()
        return lost
