"""What a clause may have measured of gradients: the requests of `Lowering.statistic`.

An action reads what was measured in phase `reduce`, from `Step.contributions` or `Step.calibrations`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainc.compiler.method.example_units import ExampleUnits
from trainc.compiler.method.sites import MeasuredSite, fires_any
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import Duration


@dataclass(frozen=True, slots=True)
class OfExamples:
    """The squared norm of each example's gradient, by parameter of these layers: `Contribution.sq_norms`.

    `units` say what an example is where it is not a row of the batch. A norm's site may ask for the gradients
    themselves: `Contribution.gradients`.
    """

    sites: tuple[MeasuredSite, ...]
    units: ExampleUnits | None = None


@dataclass(frozen=True, slots=True)
class OfMicroBatches:
    """The squared norm of each micro-batch's gradient, by parameter: `Contribution.batch_sq_norms`."""

    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OfReplicas:
    """The same of the gradient that each replica sums up, in the `Contribution` of its last micro-batch."""

    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OfSomeExamples:
    """Now and then the squared norms of a few examples' gradients, over all parameters: `Step.calibrations`.

    They are taken one by one, `every` so often between the clause's `from` and `until`, from the step's first
    micro-batch, and kept under the clause's label.
    """

    every: Duration
    examples: int


Statistic = OfExamples | OfMicroBatches | OfReplicas | OfSomeExamples


@dataclass(slots=True)
class BatchGradient:
    """A parameter of which the squared norm of each micro-batch's gradient is taken, or of what a replica has summed.

    It is taken in the steps in which one of the clauses' gates is open; None is one that always is.
    """

    of_replica: bool
    gates: list[Gate | None] = field(default_factory=list)

    def is_open(self, clock: Clock) -> bool:
        """Say whether a clause wants it in the step at this clock."""
        return fires_any(self.gates, clock)
