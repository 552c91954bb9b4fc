"""Learning rates that grow with the batch: with its square root, or in proportion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Duration, Effect, Problem, Samples
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, ListOf, Record

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step


class BatchScaling(Construct):
    """Multiplies each learning rate by `(batch / reference) ** 0.5` (`sqrt`) or by `batch / reference` (`linear`).

    The factor is set before every step from the batch of that step. Use `sqrt` for Adam and similar
    optimizers: Malladi et al. derive it from a stochastic differential equation that training
    approximates, as one part of a rule that changes Adam's other hyperparameters too; here those
    stay as they are. `linear` is the rule of Goyal et al. for SGD with momentum, used after a
    warm-up and known to fail beyond a certain batch; it has no support for Adam. Neither rule holds
    always: compare with a run without it.

    Without `reference`, the factor is 1 for the batch that the run starts with. A spec without
    `data` needs `reference`; the batch is then what each step is given.
    """

    cite: ClassVar = (
        "sqrt: Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, NeurIPS 2022, "
        "arXiv:2205.10287; linear: Goyal et al., Accurate, Large Minibatch SGD, 2017, arXiv:1706.02677"
    )
    usage: ClassVar = "lr batch_scaling { rule = sqrt, reference = 32 samples }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("rates", "scale rates with the batch", reads=("batch",), writes=("rate", "metrics")),
    )

    rule: Literal["sqrt", "linear"] = Field(
        default="sqrt",
        description="how the factor grows with the batch: with its square root, or in proportion",
    )
    reference: Samples | None = Field(
        default=None,
        description="batch whose factor is 1, in samples. Default: the batch that the run starts with",
    )

    @field_validator("reference")
    @classmethod
    def _is_an_amount(cls, value: Duration | None) -> Duration | None:
        if value is not None and (value.unit != "samples" or value.amount <= 0):
            raise ValueError("expected an amount of samples such as `32 samples`")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn when the batch never changes, so that the factor is always 1."""
        sizes = bound.sizes
        if sizes is None or sizes.changing:
            return
        if self.reference in (None, Duration(sizes.start, "samples")):
            yield Problem(
                "no-effect",
                "the batch never changes, so the factor is always 1",
                field="",
                help="let the batch change, as with `batch = follow(gns, ...)` in `data`, or write a `reference`",
                severity="warning",
            )

    def by_definition(self, batch: int, reference: float) -> float:
        """Return the factor of a batch by definition: a power of batch / reference."""
        exponent: float = {"sqrt": 0.5, "linear": 1.0}[self.rule]
        return math.pow(batch / reference, exponent)

    def factor(self, batch: int, reference: float) -> float:
        """Return the factor of a batch, in samples as `reference` is."""
        ratio = batch / reference
        return math.sqrt(ratio) if self.rule == "sqrt" else ratio

    def lower(self, to: Lowering) -> None:
        """Give the selected parameters one factor, set before every step."""
        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        start = to.starting_batch
        if self.reference is None and start is None:
            raise ValueError(
                f"`{to.label}` needs `reference`, such as `reference = 32 samples`, because the spec has no `data`"
            )
        reference = self.reference.amount if self.reference else float(start or 0)
        lr_factor = to.lr_factor("batch", [parameter.name for parameter in to.parameters()])
        to.action(ScaleWithBatch(to.label, self, lr_factor, reference))


@dataclass(eq=False)
class ScaleWithBatch(Action):
    """Phase 2: sets the factor from the batch of the step; `reference` in samples."""

    phase = Phase.RATES
    name: str
    construct: BatchScaling
    lr_factor: LrFactor
    reference: float
    seen: list[int] = field(default_factory=list)

    def run(self, step: Step) -> None:
        size = step.batch_size
        if size < 1:
            raise ValueError(
                f"`{self.name}` needs the batch size of this step, which is not known: call "
                "`program.step(batch)` or `program.loss(batch)` without `program.begin()` before it, or "
                "add a `data` clause to the spec"
            )
        self.lr_factor.factor = step.metrics[self.name] = self.construct.factor(
            size, self.reference
        )
        self.seen = [min([size, *self.seen]), max([size, *self.seen])]

    def state_dict(self) -> ActionState:
        return {"seen": list(self.seen)} if self.seen else {}

    def state_form(self) -> Form:
        return Record({"seen": ListOf(Count(1), 2)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = [int(size) for size in state.get("seen", [])]

    def summary(self) -> str | None:
        if not self.seen:
            return None
        low, high = (self.construct.factor(size, self.reference) for size in self.seen)
        sizes = f"batches from {self.seen[0]} to {self.seen[1]} samples"
        return f"{self.name}: factors {low:.3g} to {high:.3g}, {sizes}"
