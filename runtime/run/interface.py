"""The interface between the training loop and a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch, Evaluated
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import StopRun
from trainc.runtime.step.record import Step
from trainc.runtime.storage.differences import Difference

SKIP_LIMIT = 10
"""How many steps in a row may be skipped unless the spec says it."""


class UnsoundStep(StopRun):
    """A step is not sound and the spec's `on_nan` ends the run at it; the weights are not updated."""


class NonFiniteLoss(UnsoundStep):
    """The loss of a step is NaN or infinite."""


class NonFiniteGradient(UnsoundStep):
    """The loss of a step is finite, and its gradient is not."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The fields of the spec's `run` clause that the loop reads.

    The gates are asked after each step; None: only at the end of the run. An evaluation reads `evaluation_batches`
    micro-batches, 0: the whole split; `keep` is how many checkpoints stay. `on_nan` is what follows a step that is not
    sound; for `skip` the program itself leaves such a step out, at most `skip_limit` of them in a row.
    """

    seed: int = 0
    evaluate_every: Gate | None = None
    checkpoint_every: Gate | None = None
    evaluation_batches: int = 8
    keep: int = 2
    on_nan: Literal["stop", "skip", "continue"] = "stop"
    skip_limit: int = SKIP_LIMIT


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

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Return what each loss of a sum is multiplied by, by its name in `evaluate`; empty where there is one loss."""

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

    def evaluate(self, inputs: Any, targets: Tensor) -> Evaluated:
        """Return the sum of the loss over the counted targets, their number, and other sums and counts by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as a tree of tensors and JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def summary(self) -> list[str]:
        """Return the lines of the summary, one for each part of the program."""


@runtime_checkable
class ReadsSampleIds(Protocol):
    """A program that may read which samples a step holds."""

    @property
    def reads_sample_ids(self) -> bool:
        """Return whether it does; then `step` is given them."""

    def step(self, micro_batches: list[Batch], *, sample_ids: Sequence[Tensor]) -> dict[str, float]:
        """Run one optimizer step; the ids of a micro-batch are int64 (examples,), indices in the training data."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step reports besides its metrics.

    `series[quantity][layer]` are figures per layer, `notes` are shown and go to `events.jsonl`;
    `save` asks for a checkpoint after this step, `evaluate` for an evaluation, `stop` ends the run with a reason;
    `unsound` says what of the step is not finite; `decided` has numbers that are no function of the run, by who
    decided.
    """

    series: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    save: bool = False
    stop: str | None = None
    unsound: str | None = None
    evaluate: bool = False
    decided: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class ComparesReplicas(Protocol):
    """A program that several processes run alike."""

    def agree(self, replicas: ReplicaGroup) -> None:
        """Check that all of them have the same weights; raises ValueError where they differ."""


Meet = Callable[[Step, StopRun | None, bool], None]
"""Of a step, before its update: with what it ends the run, and whether it is skipped."""


@runtime_checkable
class TrainsApart(Protocol):
    """A program of which each of several processes may train a replica of its own."""

    @property
    def exchanges(self) -> str | None:
        """Return the clause by which they do; None where the spec has none."""

    def meet_with(self, meet: Meet) -> None:
        """Call this in every step, before anything is updated; where it raises StopRun, nothing is."""


@runtime_checkable
class HoldsParts(Protocol):
    """A program whose processes may each hold a part of its tensors."""

    @property
    def is_sharded(self) -> bool:
        """Return whether they do."""

    def own_state_dict(self) -> dict[str, Any]:
        """Return the state with DTensors, of which each process holds a part, as they are."""

    def part_for(
        self, keys: Sequence[str], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Return an empty DTensor for the tensor at some keys of a state; None for one that is not sharded."""


@runtime_checkable
class ReportsSteps(Protocol):
    """A program that reports more of a step than its metrics."""

    def report(self) -> StepReport:
        """Return the report of the last step."""


@runtime_checkable
class Decides(Protocol):
    """A program whose steps may decide by what is no function of the run, such as times."""

    def recall(self, decided: Mapping[int, Mapping[str, int]]) -> None:
        """Decide as it was reported before, by the number of the step, where these steps run again."""


@runtime_checkable
class EvaluatesOthers(Protocol):
    """A program that may evaluate with other weights than those it trains."""

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Return the block inside which the model has the weights for evaluation."""

    @property
    def evaluates(self) -> str | None:
        """Return what evaluation uses in place of the trained weights; None where it uses these."""


@runtime_checkable
class MeasuresEvaluations(Protocol):
    """A program that measures more of an evaluation than means over its batches."""

    @property
    def evaluation_readers(self) -> tuple[str, ...]:
        """Return the names of what does: with any, each process of a run must see all batches."""

    def evaluation_metrics(self) -> Mapping[str, float]:
        """Return what was measured of the batches evaluated since the last step."""


@runtime_checkable
class ReadsEvaluations(Protocol):
    """A program whose steps may read what evaluations found."""

    def measured(self, means: Mapping[str, float]) -> None:
        """Take in the means of an evaluation by name, `eval_loss` among them."""


@runtime_checkable
class RollsBack(Protocol):
    """A program whose rules may let a run go back to a checkpoint."""

    @property
    def rolls_back(self) -> bool:
        """Return whether they do."""

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, all but what rules decided since."""


@runtime_checkable
class ChecksState(Protocol):
    """A program that knows how many of its steps were not sound and skipped, and whether its state is sound."""

    @property
    def unsound_steps(self) -> int:
        """Return how many steps were skipped because they were not sound, in the whole run."""

    def unsound_state(self) -> str | None:
        """Return what of weights and optimizer state is not finite, such as `the weight of ...`; None for nothing."""


@runtime_checkable
class RequiresSavable(Protocol):
    """A program whose state may hold what no checkpoint can."""

    def require_savable(self) -> None:
        """Raise ValueError where a part of the state cannot be saved."""


@runtime_checkable
class LoadsCompatible(Protocol):
    """A program that can load a state saved under another spec."""

    def differences(self, state: Mapping[str, Any]) -> list[Difference]:
        """Return how what made a state differs from this program."""

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Load the parts that still hold; return lines on what restarts or is dropped."""
