"""Calibration: whether a classifier is right as often as it is sure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.storage.form import Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.processes.replica_group import ReplicaGroup


class Calibration(Construct):
    """Reports how far confidence and accuracy are apart, on evaluations or on training steps; changes nothing.

    The confidence of a prediction is the largest probability of the softmax, and it is right when
    that class is the target; targets that do not count are left out. With the predictions in `bins`
    by confidence, `ece` is the sum over bins of n_b / n * |accuracy - mean confidence|, `rms` the
    root of the sum of n_b / n * (accuracy - mean confidence)^2, and `brier` the mean of
    (confidence - right)^2. Bins have equal counts (they differ by one at most) or equal widths,
    (lo, hi]. Predictions of equal confidence count with their mean accuracy, so that the order of
    the data does not matter. An evaluation is what `program.evaluate` gets between two steps, in
    this process; in a loop of your own `program.evaluation_metrics()` ends it.
    """

    cite: ClassVar = (
        "Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599; with "
        "bins of equal counts: Kadavath et al., Language Models (Mostly) Know What They Know, 2022, "
        "arXiv:2207.05221; Brier, Monthly Weather Review 78 (1950) 1"
    )
    usage: ClassVar = "observe calibration { bins = 15 }"
    signals: ClassVar = {
        "ece": Signal("expected calibration error, 0 to 1", title="calibration error"),
        "rms": "root mean square of the calibration error, 0 to 1",
        "brier": Signal("mean square of confidence minus right, 0 to 1", title="Brier score"),
        "confidence": "mean confidence, 0 to 1",
        "right": "fraction of predictions that are right, 0 to 1",
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

    def lower(self, to: Lowering) -> None:
        """Read evaluations or training steps."""
        to.observe(Predictions(to.label, self), self.of)

    def reference(self, confidence: Tensor, right: Tensor) -> dict[str, float]:
        """Return the five measures of predictions: confidences (n,), and which are right (n,), 0 or 1."""
        import torch

        order = confidence.double().argsort()
        confidence, right = confidence.double()[order], right.double()[order]
        right = _mean_of_equals(confidence, right)
        count = len(confidence)
        number = torch.arange(count, device=confidence.device) * self.bins // count
        if self.binning == "equal_width":
            number = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1
        zeros = confidence.new_zeros(self.bins)
        gaps = zeros.index_add(0, number, right - confidence)
        sizes = zeros.index_add(0, number, torch.ones_like(confidence))
        full = sizes > 0
        return {
            "ece": float(gaps.abs().sum() / count),
            "rms": float((gaps[full].square() / sizes[full]).sum() / count) ** 0.5,
            "brier": float((confidence.square() - 2 * confidence * right + right).mean()),
            "confidence": float(confidence.mean()),
            "right": float(right.mean()),
        }


def _mean_of_equals(confidence: Tensor, right: Tensor) -> Tensor:
    """Give each prediction the mean accuracy of those with the same confidence, which are neighbours."""
    import torch

    _, group, sizes = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    sums = right.new_zeros(len(sizes)).index_add(0, group, right)
    mean: Tensor = (sums / sizes)[group]
    return mean


class Predictions(Observer):
    """Phase 12: keeps the confidences of all predictions, and which are right, until they are measured."""

    of_classes = True

    def __init__(self, name: str, construct: Calibration) -> None:
        self.name, self.construct = name, construct
        self.seen: list[Tensor] = []
        self.first = self.last = float("nan")
        """The calibration error measured first and last, for the summary."""

    def see(self, forward: Seen) -> None:
        import torch

        logits, counted = forward.view(0), forward.counted
        logits = logits[counted]
        top = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).max(-1)
        right = top.indices == forward.targets[counted]
        self.seen.append(torch.stack([top.values, right.to(top.values.dtype)]))

    def found(self, replicas: ReplicaGroup | None = None) -> dict[str, float]:
        import torch

        own = torch.cat(self.seen, 1) if self.seen else torch.zeros(2, 0)
        if replicas is not None:
            own = _of_all(own, replicas)
        if own.shape[1] == 0:
            return {}
        found = self.construct.reference(own[0], own[1])
        self.last = found["ece"]
        self.first = self.last if self.first != self.first else self.first
        return found

    def forget(self) -> None:
        self.seen = []

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


def _of_all(own: Tensor, replicas: ReplicaGroup) -> Tensor:
    """Return the predictions (2, n) of all replicas, which may have different numbers of them."""
    import torch

    counts = [int(count) for count in replicas.gather_rows([own.shape[1]])[:, 0]]
    padded = own.new_zeros(2, max(counts))
    padded[:, : own.shape[1]] = own
    rows = replicas.gather_rows(padded.flatten().tolist()).view(len(counts), 2, -1)
    parts = [row[:, :count] for row, count in zip(rows, counts, strict=True)]
    return torch.cat(parts, 1)
