"""SWA: the running mean of the weights over the last part of a run, with statistics of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.regularize.weights._average import Average
from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class Swa(Construct):
    """Averages the weights of all updates alike, e <- e + (w - e) / (n + 1); evaluation and saving use e.

    An update follows each step between `from` and `until`, or with `every 1 epoch` each epoch: write `from 75%` and a
    high rate for the window. The first update copies. Parameters that nothing trains and those that are not selected
    are the model's own. Averages of 16-bit weights are held in float32, and rounded where they are used. Entries that
    a mask sets to zero become zero in e with them.

    The running statistics of BatchNorm layers are not those of e. Before e is evaluated or saved they are estimated
    anew, as means over training batches that pass through e, each normalized by its own statistics (`statistics =
    estimate`); the other layers are in evaluation mode. `trainc run` reads the batches from the training data as it
    stands; in a loop of your own say once where they are: `program.estimate_from(lambda: loader)`. Other saved buffers
    are those of the model at the last update.
    """

    cite: ClassVar = (
        "Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018,"
        " arXiv:1803.05407"
    )
    usage: ClassVar = "regularize swa from 75% every 10 steps"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("observe", "update the mean of the weights", ("params", "clock"), ("metrics",)),
    )

    statistics: Literal["estimate", "copy"] = Field(
        default="estimate",
        description="whether running statistics of BatchNorm are estimated from training batches, or the model's",
    )
    batches: int | None = Field(
        default=None,
        ge=1,
        description="training batches that they are estimated from; all unless given",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report a selection in which all parameters are frozen."""
        if bound.parameters and not any(p.trainable for p in bound.parameters):
            message = f"all {len(bound.parameters)} selected parameters are frozen"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")

    def lower(self, to: Lowering) -> None:
        """Keep the mean beside the model, update it, and evaluate with it."""
        names = [entry.name for entry in to.parameters()]
        held = to.companion("mean", since="call", parameters=names, wide=True)
        to.evaluate_with(held)
        if self.statistics == "estimate":
            held.estimates = self.batches or 0
        to.action(Average(to.label, held, lambda _, n: n / (n + 1), copies_buffers=True))

    def reference(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the mean of a parameter's values at the updates."""
        import torch

        return torch.stack(list(weights)).mean(0)
