"""The gradient noise scale, measured in the backward pass of the selected layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainc.dsl.reading.construct import (
    Construct,
    Duration,
    Effect,
    Period,
    Problem,
    RuleExplanation,
    Signal,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.noise_scale.estimate import Estimate
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table


class Gns(Construct):
    """Measures B_simple = tr(Sigma) / |G|^2, the batch size at which noise and signal are equal.

    With c_b = w_b g_b what example b contributes to the step's gradient, and q = sum w_b^2:
    |G|^2 = (|sum c_b|^2 - sum |c_b|^2) / (1 - q),
    tr(Sigma) = (sum |c_b|^2 / q - |sum c_b|^2) / (1 - q).
    Both are averaged over steps before they are divided. While one of the averages is not above
    zero, the noise scale is NaN, and the summary says why. Gradients are those before clipping. A
    penalty on the measured weights counts as signal. The construct only reports; a rule or a
    `batch` policy can use what it measures.
    """

    cite: ClassVar = (
        "Gray et al., Normalization Layer Per-Example Gradients, NeurIPS 2024, arXiv:2411.00999; "
        "McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162"
    )
    usage: ClassVar = "noise_scale gns on type(LayerNorm, RMSNorm) { smooth = 200 steps }"
    targets: ClassVar = "modules"
    default_on: ClassVar = "role(norm)"
    signals: ClassVar = {
        "": Signal("noise scale of the measured weights", "samples", ("low", "high"), "", True),
        "signal": "average |G|^2 over the measured weights, in squared units of the gradient",
        "noise": "average tr(Sigma) over the measured weights, in squared units of the gradient",
        "error": "standard error of the noise scale, in samples",
        "low": Signal("lower end of the noise scale's interval", "samples"),
        "high": Signal("upper end of the noise scale's interval; may be infinite", "samples"),
        "total": Signal(
            "noise scale of the whole model by calibration; NaN without `calibrate`",
            "samples",
            ("total_low", "total_high"),
            "of the whole model",
            True,
        ),
        "total_low": Signal("lower end of the interval of `total`", "samples"),
        "total_high": Signal("upper end of the interval of `total`", "samples"),
        "slope": "ratio of `total` to the noise scale, by calibration",
    }
    functions: ClassVar = tuple(
        f"trainc.runtime.noise_scale.estimators:{name}"
        for name in ("noise_scale", "noise_scale_from_contributions")
    )
    effects: ClassVar = (
        Effect("backward", "measure per-example gradients", ("loss",), ("probe",)),
        Effect(
            "reduce",
            "estimate the noise scale",
            ("probe", "gradient", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals if name)),
        ),
    )
    rules: ClassVar = {
        "norm-mixes-examples": RuleExplanation(
            "Statistics of examples are requested in a model that mixes them, as a BatchNorm in train mode does.",
            "No gradient of any layer then belongs to one example alone, so the number would mean nothing.",
            "Put the layer in eval mode, compare micro-batches or groups, or use LayerNorm, RMSNorm, GroupNorm.",
        ),
        "nothing-to-measure": RuleExplanation(
            "A clause selects something that it cannot measure.",
            "The statistic would be missing from every report, or be read as zero.",
            "Exclude it from the selection, or add what the label says is missing.",
        ),
    }

    smooth: Duration = Field(
        default=Duration(200, "steps"),
        description="half-life of the averages, in any unit except seconds; steps are converted to samples "
        "at the starting batch, also when the batch changes",
    )
    errors: float = Field(
        default=0.0,
        ge=0,
        description="the noise scale is NaN unless |G|^2 is this many standard errors above zero",
    )
    level: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="probability that an interval holds the true value, as in `90%`",
    )
    method: Literal["per_example", "micro_batch", "replica", "ghost"] = Field(
        default="per_example",
        description="what is compared with the gradient of the step: the gradient of each example, of each "
        "micro-batch, of each replica, or of each group of `group` samples that BatchNorm normalizes together",
    )
    group: int = Field(
        default=0, ge=0, description="samples of one group, with `method = ghost` only"
    )
    example: Literal["row", "document"] = Field(
        default="row",
        description="what one example is: a row of the batch, or a document that ends with `separator`",
    )
    separator: int | None = Field(
        default=None,
        ge=0,
        description="token that ends a document, with `example = document` only",
    )
    interval: Literal["steps", "jackknife"] = Field(
        default="steps",
        description="how intervals are found: from the scatter of the steps, or by a jackknife over the examples "
        "of each step, for norm layers only",
    )
    geometry: Literal["euclidean", "adam", "sign"] = Field(
        default="euclidean",
        description="norm of noise and signal: Euclidean, Euclidean after division by the root of Adam's second "
        "moments, or L1 for sign descent; the last two for norm layers only",
    )
    calibrate: Period | None = Field(
        default=None,
        description="how often all layers are measured, one example at a time, to find the noise scale of the whole "
        "model from that of the measured layers",
    )
    calibrate_examples: int = Field(
        default=16,
        ge=2,
        description="examples of one calibration, from the step's first micro-batch, and at most all of it",
    )
    calibrate_smooth: float = Field(
        default=4.0,
        gt=0,
        description="half-life of the calibration's regression, counted in calibrations, if longer than `smooth`; a "
        "long half-life is more precise, a short one follows changes sooner",
    )

    @field_validator("smooth")
    @classmethod
    def _is_half_life(cls, value: Duration) -> Duration:
        if value.amount <= 0 or value.unit == "seconds":
            raise ValueError("expected a duration such as `200 steps` or `20M tokens`")
        return value

    @field_validator("calibrate")
    @classmethod
    def _can_calibrate(cls, value: Duration | None, info: ValidationInfo) -> Duration | None:
        """Refuse a length of 0, and `calibrate` in a clause that does not measure Euclidean norms of single rows."""
        given = info.data
        if value is None:
            return None
        if value.amount <= 0:
            raise ValueError("expected a duration such as `500 steps`")
        if given.get("example") == "document":
            raise ValueError(
                "`calibrate` needs `example = row`: remove `calibrate`, or calibrate a second clause without `example`"
            )
        if given.get("geometry") in ("adam", "sign"):
            raise ValueError(
                "`calibrate` needs `geometry = euclidean`: remove `calibrate`, or calibrate a second clause without"
                " `geometry`"
            )
        if given.get("method") == "ghost":
            raise ValueError(
                "`calibrate` measures single examples, but `method = ghost` measures groups: remove `calibrate`"
            )
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Gns:
        if self.method == "ghost" and self.group < 2:
            raise ValueError("`method = ghost` needs a group of two or more, such as `group = 8`")
        if self.method != "ghost" and self.group > 1:
            raise ValueError("`group` needs `method = ghost`")
        if self.example == "document" and self.separator is None:
            raise ValueError("`example = document` needs `separator`, such as `separator = 0`")
        if self.example != "document" and self.separator is not None:
            raise ValueError("`separator` needs `example = document`")
        if self.method != "per_example" and (setting := self.gradients_setting):
            raise ValueError(f"`{setting}` needs `method = per_example`, not `{self.method}`")
        if self.geometry == "sign" and self.interval == "jackknife":
            raise ValueError("`geometry = sign` has no jackknife: remove `interval`")
        return self

    @property
    def gradients_setting(self) -> str | None:
        """Return the setting that needs the gradients of single examples; None if their norms are enough."""
        if self.geometry != "euclidean":
            return f"geometry = {self.geometry}"
        if self.interval == "jackknife":
            return "interval = jackknife"
        return "example = document" if self.example == "document" else None

    def unit_of(self, signal: str) -> str | None:
        """Return what a signal counts: examples for noise scales and interval ends, else None."""
        unit = super().unit_of(signal)
        return "documents" if unit and self.example == "document" else unit

    def unmeasured_reason(self, signal: str) -> tuple[str, str] | None:
        """Return that signals of the whole model need `calibrate`; None for the other signals."""
        if self.calibrate is None and signal in ("total", "total_low", "total_high", "slope"):
            return (
                "only calibrations measure this signal, but the clause has no `calibrate`",
                "add `calibrate = 500 steps` or similar to the clause",
            )
        return None

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: not all methods measure in the backward pass."""
        return effect.phase != "backward" or self.method in ("per_example", "ghost")

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers whose examples have no gradients, and models and batches that do not allow the method."""
        from trainc.compiler.constructs.noise_scale import _requirements

        if self.method == "micro_batch":
            yield from _requirements.micro_batch_problems(bound)
        if self.calibrate is not None:
            yield from _requirements.calibration_problems(self, bound)
        problems: list[Problem] = []
        if self.method not in ("micro_batch", "replica"):
            problems = list(_requirements.module_problems(self, bound))
        yield from problems
        if not problems:
            yield from _requirements.mixing_problems(self, bound)

    def signal_text(self, signal: str, label: str, record: Mapping[str, Any]) -> str | None:
        """Return a noise scale with its interval, or why it is undetermined."""
        from trainc.runtime.noise_scale import format

        if signal == "total":
            return format.format_whole_model(record, label)
        return None if signal else format.format_noise_scale(record, label)

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return pictures of noise scales: over the run, by layer, and of calibrations."""
        from trainc.runtime.noise_scale.pictures.panels import noise_panels

        return noise_panels(clauses, runs)

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterable[Table]:
        """Return the table of the layers at the end of a run."""
        from trainc.runtime.noise_scale.pictures.layer_table import layer_tables

        return layer_tables(label, str(self.unit_of("")), records)

    def lower(self, to: Lowering) -> None:
        """Have what the method compares measured, and the noise scale estimated from it."""
        from trainc.compiler.constructs.noise_scale._gns import lower

        lower(self, to)

    @staticmethod
    def reference(
        loss: Callable[[int], Tensor], weights: Sequence[float], parameters: Sequence[Tensor]
    ) -> tuple[Estimate, list[float]]:
        """Return one step's estimate and every example's |c_b|^2, one backward pass per example.

        `loss(b)` is the loss of example b alone and `weights[b]` its weight in the step's loss.
        """
        import torch

        from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions

        contributions = []
        for b, weight in enumerate(weights):
            gradients = torch.autograd.grad(weight * loss(b), list(parameters))
            contributions.append(torch.cat([gradient.flatten() for gradient in gradients]))
        squares = [float(c.square().sum()) for c in contributions]
        batch_sq_norm = float(torch.stack(contributions).sum(0).square().sum())
        q = math.fsum(weight * weight for weight in weights)
        return noise_scale_from_contributions(math.fsum(squares), batch_sq_norm, q), squares
