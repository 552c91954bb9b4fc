"""What the loop asks of a program: the one place where `trainc run` and a compiled spec meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from trainc.runtime.data.batch import Batch
from trainc.runtime.schedule.clock import Clock, Gate, RunLength
from trainc.runtime.step.action import StopRun


class NonFiniteLoss(StopRun):
    """The loss is NaN or infinite and the spec says to stop; the update was not made."""


class Settings(Protocol):
    """What the loop reads from the spec's `run` clause."""

    @property
    def seed(self) -> int:
        """Return the seed of the data's order and of torch's generators."""
        ...

    @property
    def evaluate_every(self) -> Gate | None:
        """Return when to evaluate, asked after each step; None: only at the end."""
        ...

    @property
    def checkpoint_every(self) -> Gate | None:
        """Return when to save a checkpoint, asked after each step; None: only at the end."""
        ...

    @property
    def evaluation_batches(self) -> int:
        """Return how many micro-batches an evaluation reads; 0: the whole split."""
        ...

    @property
    def on_nan(self) -> Literal["stop", "skip", "continue"]:
        """Return what follows a non-finite loss; to `skip` the update is the program's part."""
        ...


class RunnableProgram(Protocol):
    """A compiled program as the loop sees it."""

    @property
    def clock(self) -> Clock:
        """Return the clock, which a step advances."""
        ...

    @property
    def length(self) -> RunLength | None:
        """Return how long the run lasts; None: it cannot be run by the loop."""
        ...

    @property
    def settings(self) -> Settings:
        """Return seed, gates and policies."""
        ...

    def begin(self) -> object:
        """Open the next step, in which rules choose its batch size; may raise `StopRun`."""
        ...

    @property
    def batch_size(self) -> int:
        """Return the number of samples of the step that is open, or of the next."""
        ...

    @property
    def micro_size(self) -> int:
        """Return the number of samples of a micro-batch."""
        ...

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Run one optimizer step and advance the clock; return `loss`, `lr_min`, `lr_max`, ...

        Metrics must be functions of the run; a name that begins with `seconds` is a time. Raises
        `StopRun(reason)` or `StopRun(reason, metrics)` to end the run.
        """
        ...

    def evaluate(self, inputs: Any, targets: Tensor) -> tuple[float, int, Mapping[str, float]]:
        """Return the sum of the loss over the targets, their number, and further sums."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as a tree of tensors and JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...

    def summary(self) -> list[str]:
        """Return lines on what the parts of the program did over the run."""
        ...


@dataclass(frozen=True, slots=True)
class Report:
    """What a step has to say besides its metrics.

    `series[quantity][layer]` are figures per layer, `notes` are for people and `events.jsonl`;
    `save` asks for a checkpoint after this step, `stop` ends the run with a reason.
    """

    series: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    save: bool = False
    stop: str | None = None


@runtime_checkable
class Reporting(Protocol):
    """A program that has more to say about a step than numbers."""

    def report(self) -> Report:
        """Return what the last step has to say."""
        ...


@runtime_checkable
class LoadsCompatible(Protocol):
    """A program that can go on from the state of another spec's."""

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Restore what fits; return what does not go on, in lines."""
        ...
