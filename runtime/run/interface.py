"""The interface between the training loop and a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from trainc.runtime.data.batch import Batch
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import StopRun


class NonFiniteLoss(StopRun):
    """The loss is NaN or infinite and the spec says `on_nan = stop`; the weights are not updated."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The fields of the spec's `run` clause that the loop reads.

    The gates are asked after each step; None: only at the end of the run. An evaluation reads `evaluation_batches`
    micro-batches, 0: the whole split; `keep` is how many checkpoints stay. `on_nan` is what follows a non-finite loss;
    the program itself skips the update for `skip`.
    """

    seed: int = 0
    evaluate_every: Gate | None = None
    checkpoint_every: Gate | None = None
    evaluation_batches: int = 8
    keep: int = 2
    on_nan: Literal["stop", "skip", "continue"] = "stop"


class RunnableProgram(Protocol):
    """A compiled program as the loop sees it."""

    @property
    def clock(self) -> Clock:
        """Return the clock, which a step advances."""

    @property
    def length(self) -> RunLength | None:
        """Return how long the run lasts; None if the spec does not say, and then the loop cannot run it."""

    @property
    def settings(self) -> RunSettings:
        """Return the settings of the run."""

    def begin(self) -> object:
        """Open the next step, which sets its batch size; may raise `StopRun`."""

    @property
    def batch_size(self) -> int:
        """Return the number of samples of the open step, or of the next one."""

    @property
    def micro_size(self) -> int:
        """Return the number of samples of a micro-batch."""

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Run one optimizer step and advance the clock; return `loss`, `lr_min`, `lr_max`, ...

        Metrics must be functions of the run, except that names that begin with `seconds` are times.
        Raises `StopRun(reason)` or `StopRun(reason, metrics)` to end the run.
        """

    def evaluate(self, inputs: Any, targets: Tensor) -> tuple[float, int, Mapping[str, float]]:
        """Return the sum of the loss over the targets, their number, and other sums by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as a tree of tensors and JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def summary(self) -> list[str]:
        """Return the lines of the summary, one for each part of the program."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step reports besides its metrics.

    `series[quantity][layer]` are figures per layer, `notes` are shown and go to `events.jsonl`;
    `save` asks for a checkpoint after this step, `stop` ends the run with a reason.
    """

    series: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    save: bool = False
    stop: str | None = None


@runtime_checkable
class ReportsSteps(Protocol):
    """A program that reports more of a step than its metrics."""

    def report(self) -> StepReport:
        """Return the report of the last step."""


@runtime_checkable
class LoadsCompatible(Protocol):
    """A program that can load a state saved under another spec."""

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Load the parts that still hold; return lines on what restarts or is dropped."""
