"""Learning rates and the update of any torch optimizer; how its state is kept is in `runtime/torch_optimizer`.

No policy overwrites a learning rate: the rate of a parameter is `base(clock)` times the named factors of the policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.soundness.sound import unsound_tensor
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.entry_updates import EntryUpdates
from trainc.runtime.step.gradients import GradientNotFinite
from trainc.runtime.step.held_updates import DecayForm, HeldUpdates, Stepped
from trainc.runtime.step.record import Step
from trainc.runtime.torch_optimizer.beginning import first_state, make_missing
from trainc.runtime.torch_optimizer.compatible_state import load_compatible, other_state
from trainc.runtime.torch_optimizer.gradients import free_gradients
from trainc.runtime.torch_optimizer.modes import has_modes
from trainc.runtime.torch_optimizer.named_state import NamedState
from trainc.runtime.torch_optimizer.preconditioner import second_moment_scale
from trainc.runtime.torch_optimizer.problem import explain_failure, refuse_moved
from trainc.runtime.torch_optimizer.scheduled_options import (
    own_rate,
    put_rates,
    set_others,
    set_rate,
)
from trainc.runtime.torch_optimizer.slots import OPTION_FACTORS as OPTION_FACTORS
from trainc.runtime.torch_optimizer.slots import LrFactor as LrFactor
from trainc.runtime.torch_optimizer.slots import Option as Option
from trainc.runtime.torch_optimizer.slots import OptionValue as OptionValue
from trainc.runtime.torch_optimizer.slots import OptionValues as OptionValues
from trainc.runtime.torch_optimizer.slots import ParamSlot as ParamSlot
from trainc.runtime.torch_optimizer.slots import first_refused, group_slots
from trainc.runtime.torch_optimizer.slots import parts_of as parts_of
from trainc.runtime.torch_optimizer.state_form import OptimizerForm


class OptimizerStep(Action):
    """Phase 9: call `step()` of a torch optimizer over the slots, then free the gradients.

    `make(groups)` builds the torch optimizer from parameter-group dicts, on first use: a plan needs no optimizer, and
    building one loads much of torch. Updates that a clause changes are left to `updates`, which adds them later;
    `decay_form` says how they depend on the weights, None where that is not known. With `asks`, `step` is called with
    the closure of the step; an error in one of its calls leaves the weights as they were before, and clears the state.
    `steady`: the schedule of the rate is one number, so that an optimizer may change its rate by itself. `entries`
    steps the trained entries of some parameters in place of the torch optimizer, whose state it keeps.
    """

    runs_model, phase = True, Phase.OPTIMIZER

    def __init__(
        self,
        name: str,
        slots: Sequence[ParamSlot],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        decay_form: DecayForm | None = None,
        updates: HeldUpdates | None = None,
        *,
        asks: bool = False,
        steady: bool = False,
        entries: EntryUpdates | None = None,
    ) -> None:
        self.name = name
        self._entries = entries
        self.asks, self.steady = asks, steady
        self._noted = self.started = False
        """`started`: whether the torch optimizer has stepped or was loaded, so that it may have state."""
        self.slots = tuple(slots)
        self.groups = group_slots(slots)
        self._make = make
        self._decay_form = decay_form
        self._updates = updates

    @cached_property
    def named(self) -> NamedState:
        """Return the torch optimizer with the names of its parameters; one that has modes is in training mode."""
        slots = {slot.name: slot.tensor for slot in self.slots}
        groups: list[dict[str, Any]] = [
            {"params": [slot.tensor for slot in group], **group[0].built()} for group in self.groups
        ]
        named = NamedState(self.name, self._make(groups), slots)
        if has_modes(named.optimizer):
            named.optimizer.train()
        return named

    @cached_property
    def _grouped(self) -> list[list[ParamSlot]]:
        """The slots of each group of the torch optimizer."""
        slots = {slot.name: slot for slot in self.slots}
        return [[slots[name] for name in names if name in slots] for names in self.named.groups]

    def first_refused(self) -> str | None:
        """Return the first parameter for which alone no torch optimizer can be built; None where that holds for all."""
        return first_refused(self._make, self.slots)

    @property
    def torch(self) -> torch.optim.Optimizer:
        """Return the torch optimizer."""
        return self.named.optimizer

    @property
    def has_modes(self) -> bool:
        """Whether the optimizer puts other weights in place for evaluation: it has `train()` and `eval()`."""
        return has_modes(self.torch)

    def rebuild(self) -> None:
        """Drop the torch optimizer with all of its state; it is built anew on first use."""
        self.started = False
        for made in ("named", "_grouped"):
            vars(self).pop(made, None)

    def in_groups(self) -> Iterator[tuple[int, dict[str, Any], list[ParamSlot]]]:
        """Yield number and options of each group of the torch optimizer, and its slots."""
        pairs = zip(self._grouped, self.torch.param_groups, strict=True)
        for i, (slots, options) in enumerate(pairs):
            yield i, options, slots

    def run(self, step: Step) -> None:
        self.started = True
        make_missing(self.named, self._make, self.in_groups())
        changed = frozenset() if self._updates is None else self._updates.wanted(step.clock)
        if self._updates is not None and changed:
            self._updates.hold(step, self._step_torch, [*self.trained(changed)], self._decay_form)
        elif self.asks:
            self._step_asking(step)
        else:
            self._step_torch()
        self._notice_own_rates(step)
        self.zero_grad()

    def _step_asking(self, step: Step) -> None:
        """Step with the step's closure, and count its calls."""
        closure, calls = step.closure, 0
        if closure is None:
            raise RuntimeError(f"{self.name}: this step has no closure, which `program.step` makes")

        def counted() -> Tensor:
            nonlocal calls
            calls += 1
            pairs = zip(self.slots, weights, strict=True)
            # Some optimizers move the weights before they ask for the first time.
            moved = calls > 1 or not all(torch.equal(s.tensor, before) for s, before in pairs)
            return closure(moved)

        weights = [slot.tensor.detach().clone() for slot in self.slots]
        try:
            self.torch.step(counted)  # type: ignore[arg-type]  # a loss as a tensor, as in torch's own examples
            refuse_moved(self.name, self.named.kind, self.slots, weights)
            found = unsound_tensor((slot.name, slot.tensor) for slot in self.slots)
            if found is not None and not step.may_be_unsound:
                raise GradientNotFinite(
                    f"`{found}` is not finite after {calls} evaluations of `{self.name}`, although the loss was"
                    f" {step.loss:.6g} before,"
                )
        except BaseException:
            for slot, weight in zip(self.slots, weights, strict=True):
                slot.tensor.detach().copy_(weight)
            self.rebuild()
            raise
        step.metrics[f"{self.name}.evaluations"] = float(calls)

    def _step_torch(self) -> None:
        handle = None
        if self._entries is not None:  # behind the hooks of others, which see all gradients
            handle = self.torch.register_step_pre_hook(self._step_entries)
        try:
            self.torch.step()
        except Exception as error:
            explain_failure(self.name, self.named.kind, self.slots, error)
            raise
        finally:
            if handle is not None:
                handle.remove()

    def _step_entries(self, *given: object) -> None:
        """Step the entries that have an operator of their own, which frees their gradients."""
        entries, state = self._entries, self.torch.state
        assert entries is not None
        for _, options, slots in self.in_groups():
            found = [s for s in slots if s.name in entries and s.tensor.grad is not None]
            with torch.no_grad():
                entries.step(options, {slot.name: state[slot.tensor] for slot in found})

    def _notice_own_rates(self, step: Step) -> None:
        """Say once that the optimizer sets its rates itself; raises OptimizerProblem where a schedule would undo it."""
        for number, options, slots in self.in_groups():
            note = own_rate(self.named, number, options, slots, steady=self.steady)
            if note is not None and not self._noted:
                self._noted = True
                step.notes.append(note)

    def trained(self, names: frozenset[str]) -> Iterator[Stepped]:
        """Yield those of the parameters that have a gradient, so that torch steps them."""
        for _, options, slots in self.in_groups():
            for slot in slots:
                if slot.name in names and slot.tensor.grad is not None:
                    decay = options.get("weight_decay", slot.weight_decay)
                    yield Stepped(slot.name, slot.tensor, options["lr"], decay)

    def memory(self) -> int:
        """Return the bytes of the copies of the weights that a step with `asks` makes."""
        return sum(slot.tensor.nbytes for slot in self.slots) if self.asks else 0

    def zero_grad(self) -> None:
        """Free the gradients."""
        free_gradients(self.torch)

    def state_of(self, name: str) -> Mapping[str, Any]:
        """Return the torch optimizer's state of a parameter, or of its trained entries; empty without one."""
        slot = self._slot(name)
        found: Mapping[str, Any] = {} if slot is None else self.torch.state.get(slot.tensor, {})
        return found

    def forget(self, name: str) -> None:
        """Drop the torch optimizer's state of a parameter, or of its trained entries."""
        if (slot := self._slot(name)) is not None:
            self.torch.state.pop(slot.tensor, None)

    def first_state(self, name: str, values: Tensor) -> Mapping[str, Any]:
        """Return the state with which the torch optimizer begins these values of a parameter; empty without one."""
        if (slot := self._slot(name)) is None:
            return {}
        options = next(group for _, group, slots in self.in_groups() if slot in slots)
        return first_state(self._make, values, options)

    def preconditioner(self, name: str) -> Tensor | None:
        """Return 1 / (sqrt(v_hat) + eps) from Adam's second moments so far; None for an optimizer that is not Adam."""
        if (slot := self._slot(name)) is None:
            return None
        options = next(group for _, group, slots in self.in_groups() if slot in slots)
        return second_moment_scale(self.torch, options, self.state_of(name))

    def _slot(self, name: str) -> ParamSlot | None:
        return next((slot for slot in self.slots if slot.name == name), None)

    # its state

    def state_dict(self) -> ActionState:
        return self.named.state()

    def state_form(self) -> OptimizerForm:
        return OptimizerForm(self.named, self._make, {s.name for s in self.slots if s.any_length})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rebuild()
        if state:
            self.named.load(state)
            self.started = True

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint says of the optimizer: its class, and how many entries it trains."""
        return {"class": self.named.kind, "size": self.named.size}

    def cannot_continue(self, before: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
        """Return why no part of a state fits: it is of another class, or one vector over other parameters."""
        return other_state(self.named, before, state)

    def restore_rates(self, rates: Mapping[str, float]) -> None:
        """Put the rates of the last step in force, by parameter, where the optimizer has set none itself."""
        put_rates(self.named, rates, self.in_groups())

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        self.rebuild()
        self.started = bool(state)
        return load_compatible(self.state_form().entries, state) if state else None


class OwnOptimizer(OptimizerStep):
    """Phase 9 of a spec without an optimizer: the gradients stay for the one that the user's own code steps."""

    def __init__(self, slots: Sequence[ParamSlot]) -> None:
        super().__init__("your optimizer", slots, lambda groups: torch.optim.SGD(groups, lr=0.0))
        self._left: list[tuple[Tensor, int]] = []

    def run(self, step: Step) -> None:
        """Leave weights and gradients as they are."""
        self._left = [(grad, grad._version) for grad in self._gradients()]

    def check_freed(self) -> None:
        """Raise RuntimeError where a new step would add to the gradients of the last one."""
        now = {id(grad) for grad in self._gradients()}
        if any(id(grad) in now and grad._version == version for grad, version in self._left):
            raise RuntimeError(
                "the gradients of the last step are still there, and this step would add to them: after"
                " `program.update()` call `step()` and `zero_grad()` of your optimizer"
            )
        self._left = []

    def _gradients(self) -> list[Tensor]:
        return [slot.tensor.grad for slot in self.slots if slot.tensor.grad is not None]

    def state_dict(self) -> ActionState:
        return {}


class Rates(Action):
    """Phase 2: set the rate and other options of every group to what schedules give, times the factors of policies."""

    phase = Phase.RATES
    figures = ("lowest", "highest")

    def __init__(self, name: str, optimizer: OptimizerStep) -> None:
        self.name = name
        self.optimizer = optimizer
        self.lowest, self.highest = math.inf, -math.inf

    def base(self, clock: Clock) -> float:
        """Return the learning rate at a clock without factors: the highest, where parameters have different ones."""
        bases = [slots[0].rate(clock) for slots in self.optimizer.groups]
        return next((base for base in bases if math.isnan(base)), max(bases))

    def run(self, step: Step) -> None:
        base, clock, named = self.base(step.clock), step.clock, self.optimizer.named
        if not math.isfinite(base):
            raise ValueError(
                f"{self.name}: the learning rate is {base}, because a signal in its schedule is not measured yet"
            )
        rates: list[float] = []
        moved: dict[str, float] = {}
        for number, options, slots in self.optimizer.in_groups():
            if not slots:
                continue
            rate = slots[0].rate(clock) * slots[0].factor(clock)
            rates.append(set_rate(named, number, options, rate))
            for name, value in set_others(named, number, options, slots[0], clock):
                moved[name] = max(value, moved.get(name, value))
        low, high = min(rates), max(rates)
        step.metrics.update({f"{self.optimizer.name}.{n}": value for n, value in moved.items()})
        step.signals["lr"] = base
        step.metrics["lr_min"] = min(low, step.metrics.get("lr_min", low))
        step.metrics["lr_max"] = max(high, step.metrics.get("lr_max", high))
        self.lowest, self.highest = min(low, self.lowest), max(high, self.highest)

    def summary(self) -> str | None:
        if self.lowest > self.highest:
            return None
        count = len(self.optimizer.groups)
        groups = f"{count} parameter group{'s' * (count != 1)}"
        span = f"from {self.lowest:.3g} to {self.highest:.3g}"
        return f"{self.name}: learning rates {span} in {groups}"
