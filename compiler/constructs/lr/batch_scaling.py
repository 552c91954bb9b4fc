"""Rates that grow with the batch: by its square root, or in proportion."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Duration, Effect, Problem, Samples

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class BatchScaling(Construct):
    """Multiplies each rate by `(batch / reference) ** 0.5` (`sqrt`) or by `batch / reference` (`linear`).

    Set before every step from the batch of that step, whatever chose it. Use `sqrt` for Adam and
    its kin: Malladi et al. derive it from a stochastic differential equation that training
    approximates, as one part of a rule that adjusts Adam's other hyperparameters too; those stay as
    they are written here. `linear` is the rule of Goyal et al. for SGD with momentum, which they
    use after a warm-up and see fail beyond a certain batch; nothing supports it for Adam. Neither
    is a law: compare with a run without it.

    Without `reference` it is the batch the run starts with. In a spec without `data` the batch is
    what each step is given, and `reference` is needed.
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
        description="how the factor grows with the batch: its square root, or itself",
    )
    reference: Samples | None = Field(
        default=None,
        description="batch whose factor is 1, in samples. Default: the batch the run starts with",
    )

    @field_validator("reference")
    @classmethod
    def _is_an_amount(cls, value: Duration | None) -> Duration | None:
        if value is not None and (value.unit != "samples" or value.amount <= 0):
            raise ValueError("expected an amount of samples such as `32 samples`")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn when the batch never changes, so that the factor is 1 throughout."""
        sizes = bound.sizes
        if sizes is None or sizes.changing:
            return
        if self.reference in (None, Duration(sizes.start, "samples")):
            yield Problem(
                "no-effect",
                "the batch never changes, so the factor is 1 throughout",
                field="",
                help="let the batch change, as by `batch = follow(gns, ...)` in `data`, or give a `reference`",
                severity="warning",
            )

    def by_definition(self, batch: int, reference: float) -> float:
        """Return the factor of a batch as a power of the ratio; `reference` is a field's name."""
        exponent: float = {"sqrt": 0.5, "linear": 1.0}[self.rule]
        return math.pow(batch / reference, exponent)

    def factor(self, batch: int, reference: float) -> float:
        """Return the factor of a batch, in samples as `reference` is."""
        ratio = batch / reference
        return math.sqrt(ratio) if self.rule == "sqrt" else ratio

    def lower(self, to: Lowering) -> None:
        """Give the selected parameters one factor, set in phase 2."""
        from trainc.compiler.constructs.lr._batch_scaling import ScaleWithBatch

        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        start = to.starting_batch
        if self.reference is None and start is None:
            raise ValueError(
                f"`{to.label}` needs `reference = 32 samples`: the spec names no data, which says the batch"
            )
        reference = self.reference.amount if self.reference else float(start or 0)
        lr_factor = to.lr_factor("batch", [parameter.name for parameter in to.parameters()])
        to.action(ScaleWithBatch(to.label, self, lr_factor, reference))
