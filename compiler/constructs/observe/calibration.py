"""Calibration: whether a classifier is right as often as it is sure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.observe import _temperature
from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.storage.form import Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords

BINS = ("size", "confidence", "accuracy")
"""What records have of each bin of an evaluation, behind its number."""
KEPT = 3
"""Numbers that are kept of each prediction."""


class Calibration(Construct):
    """Reports how far confidence and accuracy are apart, on evaluations or on training steps; changes nothing.

    The confidence of a prediction is the largest probability of the softmax, and it is right when
    that class is the target; targets that do not count are left out. With the predictions in `bins`
    by confidence, `ece` is the sum over bins of n_b / n * |accuracy - mean confidence|, `rms` the
    root of the sum of n_b / n * (accuracy - mean confidence)^2, `mce` the largest |accuracy - mean
    confidence| of a bin, and `brier` the mean of (confidence - right)^2; `nll` is the mean of
    -ln p(target), without weights of classes and smoothing. With `temperature = true`, `temperature`
    is the number by which logits have to be divided for the smallest `nll`, from 0.05 to 20 and to
    four digits: more than 1 where the model is too sure.

    Bins have equal counts (they differ by one at most), or equal widths: then bin i of n holds what
    is in (i/n, (i+1)/n], or in [i/n, (i+1)/n) with `closed = left`, where the last one holds 1 too.
    Measures depend on it: of twelve predictions (tests/reference/other_methods.json) ten bins give
    0.264 as (lo, hi] and 0.281 as [lo, hi), fifteen 0.298, four of equal counts 0.064, and ten of
    torchmetrics 1.9 give 0.231. Predictions of equal confidence count with their mean accuracy, so
    that the order of the data does not matter.

    An evaluation is what `program.evaluate` gets between two steps, in this process, or
    `program.read_evaluation` where your own code evaluates; in a loop of your own
    `program.evaluation_metrics()` ends it. Records of evaluations have the bins, of which
    `trainc report --plot` draws the accuracy over the confidence.
    """

    cite: ClassVar = (
        "Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599; with "
        "bins of equal counts: Kadavath et al., Language Models (Mostly) Know What They Know, 2022, "
        "arXiv:2207.05221; Brier, Monthly Weather Review 78 (1950) 1"
    )
    usage: ClassVar = "observe calibration { bins = 15 }"
    signals: ClassVar = {
        "ece": Signal("expected calibration error, 0 to 1", title="error"),
        "rms": "root mean square of the calibration error, 0 to 1",
        "mce": "largest calibration error of a bin, 0 to 1",
        "brier": Signal("mean square of confidence minus right, 0 to 1", title="Brier score"),
        "confidence": "mean confidence, 0 to 1",
        "right": "fraction of predictions that are right, 0 to 1",
        "nll": "mean of -ln p(target)",
        "temperature": Signal(
            "what logits are divided by for the smallest `nll`", title="temperature"
        ),
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "compare confidence and accuracy",
            ("forward", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    of: Literal["evaluation", "training"] = Field(
        default="evaluation",
        description="whose predictions: of evaluations, or of training steps, which have dropout and noise",
    )
    bins: int = Field(default=15, ge=1, description="number of bins of confidence")
    binning: Literal["equal_count", "equal_width"] = Field(
        default="equal_count", description="what the bins have in common"
    )
    closed: Literal["right", "left"] = Field(
        default="right",
        description="with bins of equal width, which end belongs to a bin: (lo, hi] or [lo, hi)",
    )
    temperature: bool = Field(
        default=False,
        description="find the temperature of the smallest cross-entropy, which takes 33 softmaxes of the logits",
    )

    @model_validator(mode="after")
    def _has_widths(self) -> Self:
        if self.closed == "left" and self.binning == "equal_count":
            raise ValueError(
                "`closed` is of bins of equal width: add `binning = equal_width`, or remove `closed`"
            )
        return self

    def unmeasured_reason(self, signal: str) -> tuple[str, str] | None:
        """Say that the temperature has to be asked for."""
        if signal == "temperature" and not self.temperature:
            return "the temperature is not looked for", "write `temperature = true`"
        return None

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return curves of the measures, and the accuracy by confidence of the last evaluation of each run."""
        from trainc.runtime.report.pictures.reliability import reliability_panel
        from trainc.runtime.report.signal_panels import signal_panels

        yield from signal_panels(clauses, runs)
        yield from reliability_panel(clauses, BINS)

    def lower(self, to: Lowering) -> None:
        """Read evaluations or training steps."""
        to.observe(Predictions(to.label, self), self.of)

    def reference(self, confidence: Tensor, right: Tensor) -> dict[str, float]:
        """Return six measures of predictions: confidences (n,), and which are right (n,), 0 or 1."""
        sizes, gaps, _ = self.bins_of(confidence, right)
        full = sizes > 0
        errors = gaps[full].abs() / sizes[full]
        confidence, right = confidence.double(), right.double()
        return {
            "ece": float(gaps.abs().sum() / len(confidence)),
            "rms": float((gaps[full].square() / sizes[full]).sum() / len(confidence)) ** 0.5,
            "mce": float(errors.max()),
            "brier": float((confidence - right).square().mean()),
            "confidence": float(confidence.mean()),
            "right": float(right.mean()),
        }

    def bins_of(self, confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of each bin, (bins,): predictions, sum of right minus confidence, and sum of confidence."""
        import torch

        order = confidence.double().argsort()
        confidence, right = confidence.double()[order], right.double()[order]
        right = _mean_of_equals(confidence, right)
        number = torch.arange(len(confidence), device=confidence.device)
        number = number * self.bins // len(confidence)
        if self.binning == "equal_width":
            edges = torch.arange(1, self.bins, device=confidence.device).double() / self.bins
            number = torch.bucketize(confidence, edges, right=self.closed == "left")
        zeros = confidence.new_zeros(self.bins)
        sizes = zeros.index_add(0, number, torch.ones_like(confidence))
        gaps = zeros.index_add(0, number, right - confidence)
        return sizes, gaps, zeros.index_add(0, number, confidence)


def _mean_of_equals(confidence: Tensor, right: Tensor) -> Tensor:
    """Give each prediction the mean accuracy of those with the same confidence, which are neighbours."""
    import torch

    _, group, sizes = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    sums = right.new_zeros(len(sizes)).index_add(0, group, right)
    mean: Tensor = (sums / sizes)[group]
    return mean


class Predictions(Observer):
    """Phase 12: keeps of all predictions the confidence, whether it is right, and -ln p(target), until all are seen."""

    of_classes = True

    def __init__(self, name: str, construct: Calibration) -> None:
        self.name, self.construct = name, construct
        self.seen: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.first = self.last = float("nan")
        """The calibration error measured first and last, for the summary."""

    def see(self, forward: Seen) -> None:
        import torch

        logits, targets = forward.view(0)[forward.counted], forward.targets[forward.counted]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logs = logits.log_softmax(-1)
        top = logs.max(-1)
        right = (top.indices == targets).to(logits.dtype)
        surprise = -logs.gather(-1, targets[:, None].long())[:, 0]
        self.seen.append(torch.stack([top.values.exp(), right, surprise]))
        if self.construct.temperature:
            self.slopes.append(_temperature.slopes(logits, targets.long()))

    def found(self, replicas: ReplicaGroup | None = None) -> dict[str, float]:
        import torch

        own = torch.cat(self.seen, 1) if self.seen else torch.zeros(KEPT, 0)
        own = own if replicas is None else replicas.gather_examples(own.T.double()).T
        if own.numel() == 0:
            return {}
        confidence, right, surprise = own
        found = self.construct.reference(confidence, right)
        found["nll"] = float(surprise.double().mean())
        if self.construct.temperature and (best := self._temperature(replicas)) is not None:
            found["temperature"] = best
        self.last = found["ece"]
        self.first = self.last if self.first != self.first else self.first
        return found | (self._bins(confidence, right) if self.of == "evaluation" else {})

    def _temperature(self, replicas: ReplicaGroup | None) -> float | None:
        import torch

        shape = (_temperature.POINTS, 2)
        sums = sum(self.slopes, start=torch.zeros(shape, dtype=torch.float64))
        if replicas is not None:
            sums = replicas.gather_rows(sums.flatten().tolist()).sum(0).reshape(shape)
        return _temperature.temperature(sums)

    def _bins(self, confidence: Tensor, right: Tensor) -> dict[str, float]:
        """Return of each bin that is not empty its size, mean confidence and accuracy, by names of the records."""
        found = {}
        rows = zip(
            *(one.tolist() for one in self.construct.bins_of(confidence, right)), strict=True
        )
        for number, (size, gap, total) in enumerate(rows):
            if size:
                values = (size, total / size, (total + gap) / size)
                for what, value in zip(BINS, values, strict=True):
                    found[f"bin{number}.{what}"] = value
        return found

    def forget(self) -> None:
        self.seen, self.slopes = [], []

    def state_dict(self) -> ActionState:
        return {"first": self.first, "last": self.last} if self.last == self.last else {}

    def state_form(self) -> Form:
        return Record({"first": Number(0), "last": Number(0)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.last = (state.get(n, float("nan")) for n in ("first", "last"))

    def summary(self) -> str | None:
        if self.last != self.last:
            return None
        return f"{self.name}: calibration error of {self.construct.of} {self.first:.4g} -> {self.last:.4g}"
