"""The record of one optimizer step: its measurements, and what each micro-batch contributed to its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.soundness.gradient_norm import GradientNorms


@dataclass(slots=True)
class Contribution:
    """What the examples of one micro-batch contribute to the step's gradient, which is the sum of all contributions.

    `weights` (examples,) are the examples' weights in the step's loss; `sq_norms[name]`, same shape, the squared norms
    of their contributions to one parameter's gradient; `gradients[name]`, (examples, numel), these contributions
    themselves, where a clause needs them. `batch_sq_norms[name]`, 0-d, is the squared norm of the micro-batch's
    gradient, where a clause needs it. Where a row is of a group of examples, `example_weights` (all examples,) are the
    weights of single ones. `replica` is the rank that ran the micro-batch.
    """

    weights: Tensor
    sq_norms: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    batch_sq_norms: dict[str, Tensor] = field(default_factory=dict)
    example_weights: Tensor | None = None
    replica: int = 0


@dataclass(slots=True)
class CalibrationSample:
    """A few examples, measured one by one over all parameters; the fields are those of `Contribution`."""

    weights: Tensor
    sq_norms: dict[str, Tensor]
    batch_sq_norms: dict[str, Tensor]


class Signals(dict[str, float]):
    """The last measured value of each signal, by name; NaN for one that is not measured yet."""

    def __missing__(self, name: str) -> float:
        return math.nan

    def take_evaluation(self, means: Mapping[str, float], *, inside: bool) -> None:
        """Set what an evaluation found; raises ValueError for other names, RuntimeError `inside` of a step."""
        if odd := [name for name in means if not name.startswith("eval_")]:
            raise ValueError(
                f"`measured` takes what evaluations find, such as `eval_loss`, and got `{odd[0]}`"
            )
        if inside:
            raise RuntimeError(
                "`measured` was called inside a step, whose rules have looked already: call it after `update`, or after"
                " `discard_step`"
            )
        self.update(means)


@dataclass(slots=True)
class Step:
    """One optimizer step as its actions see it."""

    clock: Clock
    parameters: Mapping[str, Parameter]
    signals: Signals
    batch_size: int
    micro_size: int
    metrics: dict[str, float] = field(default_factory=dict)
    contributions: list[Contribution] = field(default_factory=list)
    calibrations: dict[str, CalibrationSample] = field(default_factory=dict)
    series: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    loss: float = 0.0
    gradients: GradientNorms | None = None
    """The norms of the gradients as the optimizers would read them now; None where they have changed since."""
    unsound: str | None = None
    """What of the step is not finite, in words; None for a sound step."""
    may_be_unsound: bool = False
    """Whether the step goes on with a loss or a gradient that is not finite."""
    after_update: bool = False
    """Whether an update went before, since the program was made or loaded: what its optimizer keeps is there."""
    save: bool = False
    evaluate: bool = False
    notes: list[str] = field(default_factory=list)
    recorded: Mapping[str, int] = field(default_factory=dict)
    """What was decided in this step when it ran before, in a run that was resumed or went back since."""
    decided: dict[str, int] = field(default_factory=dict)
    """What was decided in this step, by who decided."""
    preconditioners: Sequence[Callable[[str], Tensor | None]] = ()
    optimizer_states: Sequence[Callable[[str], Mapping[str, Any]]] = ()
    forget_states: Sequence[Callable[[str], None]] = ()
    first_states: Sequence[Callable[[str, Tensor], Mapping[str, Any]]] = ()
    closure: Callable[[bool], Tensor] | None = None
    """Returns the step's loss at the weights of now and leaves its gradients there; set where an optimizer asks.

    It is told whether a weight was moved since the step's passes.
    """
    equals: Callable[[], ReplicaGroup | None] = lambda: None
    """Returns the processes with the weights of this one before every step, itself included; None if it is alone."""
    replicas: ReplicaGroup | None = None
    """The processes that average gradients with this one, itself included; None if it trains alone."""
    exchange_group: ReplicaGroup | None = None
    """The replicas that this one exchanges with after steps; between these each trains on its own. None without."""

    @property
    def process(self) -> int:
        """Return the number of this process among all that run this program."""
        peers = self.exchange_group or self.replicas
        return 0 if peers is None else peers.process

    def clock_after(self) -> Clock:
        """Return the clock as it will be when this step is counted, without the seconds that it takes."""
        clock, before = replace(self.clock, before=None), self.clock.before
        clock.advance(samples=self.samples, tokens=self.tokens, seconds=0.0)
        if before is not None and clock.before is not None:
            clock.before.seconds = before.seconds  # a gate in seconds sees those of the step before
        return clock

    def decide(self, name: str, choose: Callable[[], int]) -> tuple[int, bool]:
        """Return a number that is no function of the run, such as one that follows from times, and if it is recorded.

        It is what was recorded for `name` in this step, or else what `choose` returns. A run records it, and takes it
        again where it runs this step again.
        """
        again = name in self.recorded
        self.decided[name] = self.recorded[name] if again else choose()
        return self.decided[name], again

    def preconditioner(self, name: str) -> Tensor | None:
        """Return the factors that the optimizer multiplies a parameter's gradient by; None where they are unknown."""
        found = (read(name) for read in self.preconditioners)
        return next((scale for scale in found if scale is not None), None)

    def optimizer_state(self, name: str) -> Mapping[str, Any]:
        """Return what the optimizer keeps for a parameter, by torch's names; empty before its first update."""
        return next((found for read in self.optimizer_states if (found := read(name))), {})

    def first_optimizer_state(self, name: str, values: Tensor) -> Mapping[str, Any]:
        """Return what the optimizer keeps for these values of a parameter, or of entries of it, as it begins them."""
        return next((found for make in self.first_states if (found := make(name, values))), {})

    def optimizer_entries(
        self, name: str
    ) -> tuple[Mapping[str, Any], Callable[[Tensor], Mapping[str, Any]]]:
        """Return what the optimizer keeps for a parameter, and what makes that of entries that it begins."""
        return self.optimizer_state(name), partial(self.first_optimizer_state, name)

    def forget_optimizer_state(self, name: str) -> None:
        """Let the optimizer begin anew with a parameter, as before its first update, and free what it keeps for it."""
        for forget in self.forget_states:
            forget(name)

    def running_mean(self, name: str) -> Tensor | None:
        """Return the running mean, or sum, of a parameter's gradients that the optimizer keeps; None without one.

        It is the first moment of Adam or the momentum buffer of SGD, by whichever of these names torch has it.
        """
        state = self.optimizer_state(name)
        kept = (state.get(key) for key in ("exp_avg", "momentum_buffer"))
        return next((one for one in kept if isinstance(one, Tensor)), None)


@runtime_checkable
class Preconditioner(Protocol):
    """An action that multiplies gradients entry by entry, as Adam does."""

    def preconditioner(self, name: str) -> Tensor | None: ...


@runtime_checkable
class KeepsOptimizerState(Protocol):
    """An action that updates parameters and keeps a state for each."""

    def state_of(self, name: str) -> Mapping[str, Any]: ...

    def forget(self, name: str) -> None: ...

    def first_state(self, name: str, values: Tensor) -> Mapping[str, Any]: ...
