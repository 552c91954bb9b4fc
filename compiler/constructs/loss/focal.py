"""Focal loss: cross-entropy that weighs a target less, the better it is predicted already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.loss._base import ElementwiseLoss, LossConstruct
from trainc.compiler.constructs.loss.bce import BinaryCrossEntropyLoss
from trainc.compiler.constructs.loss.cross_entropy import CrossEntropyLoss
from trainc.compiler.method.loss import LossMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss

Factor = Annotated[float, Field(ge=0, le=1)]


@dataclass(eq=False)
class FocalLossOfClasses(CrossEntropyLoss):
    """Mean of -alpha_y (1 - p_y)^gamma log p_y over the targets y that are not `ignore_index`, with p = softmax.

    logits (B, ..., classes) or (B, classes, ...); targets (B, ...) int64.
    """

    name = "focal"
    gamma: float = 2.0
    alpha: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self.is_cross_entropy = False

    def misfit(self, targets: Tensor) -> str | None:
        """Return what to write where targets are no class indices."""
        if not targets.is_floating_point():
            return None
        return (
            "`loss focal` with `activation = softmax` needs class indices, and the targets are floating-point numbers:"
            " give int64 indices; or write `activation = sigmoid` for labels of which several may be true"
        )

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if (why := self.misfit(targets)) is not None:
            raise LossMismatch(why)
        logits = self.classes_last(outputs, targets)
        kept = self.counted(targets)
        index = targets.where(kept, 0).long()
        log_p = logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        each = -_modulated(log_p, self.gamma)
        if self.alpha is not None:
            each = each * self._alpha(logits)[index]
        mean: Tensor = each.where(kept, 0.0).sum() / kept.sum()
        return mean

    def _alpha(self, logits: Tensor) -> Tensor:
        """Return the factor of each class."""
        classes = logits.shape[-1]
        given = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if len(given) != classes:
            raise LossMismatch(
                f"`alpha` has {len(given)} numbers, and the logits have {classes} classes: with `activation = softmax`"
                " give one number for each class"
            )
        return logits.new_tensor(given)


class FocalLossOfLabels(ElementwiseLoss):
    """Mean of -alpha_t (1 - p_t)^gamma log p_t over all entries; output and target have one shape.

    Of a target t in [0, 1] it is t times that of a true label, p_t = sigmoid(x) with the factor alpha, and 1 - t times
    that of a false one, p_t = 1 - sigmoid(x) with 1 - alpha.
    """

    name = "focal"

    def __init__(self, gamma: float, alpha: float | None) -> None:
        self.gamma, self.alpha = gamma, alpha
        self._labels = BinaryCrossEntropyLoss(None)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        if not targets.is_floating_point():
            raise LossMismatch(
                "`loss focal` with `activation = sigmoid` needs the probability of each label, 0, 1 or between, as"
                " floating-point numbers: give `targets.float()`"
            )
        logits, targets = self.pair(outputs, targets)
        true, false = (_modulated(logsigmoid(x), self.gamma) for x in (logits, -logits))
        if self.alpha is not None:
            true, false = self.alpha * true, (1 - self.alpha) * false
        return -(targets * true + (1 - targets) * false).mean()

    def misfit(self, targets: Tensor) -> str | None:
        """Return what to write where a target is no probability."""
        found = self._labels.misfit(targets)
        return found and found.replace("`loss bce`", "`loss focal`")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[float, float]]:
        """Return how many of the labels were predicted, as `accuracy`: at a probability of one half."""
        return self._labels.metrics(outputs, targets)


def _modulated(log_p: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^gamma log p."""
    import torch

    # A power below 1 has no gradient at 0.
    wrong = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
    return wrong**gamma * log_p


class Focal(LossConstruct):
    """Trains on the mean of `-alpha (1 - p)^gamma log p`, where p is the predicted probability of what is true.

    With `activation = softmax` each target is a class, an index as of `loss cross_entropy`, and the
    mean is over all targets that are not ignored. With `sigmoid` each entry of the output is a label,
    as in `loss bce`, and the mean is over all entries; a label that is false has p = 1 - sigmoid and
    the factor `1 - alpha`. The mean is divided by the number of targets, not by the sum of `alpha`,
    and not by the number of true labels, as detectors do. `gamma = 0` without `alpha` is cross-entropy.
    """

    cite: ClassVar = (
        "Lin, Goyal, Girshick, He and Dollar, Focal Loss for Dense Object Detection, ICCV 2017, "
        "arXiv:1708.02002, equation 5"
    )
    usage: ClassVar = "loss focal { gamma = 2 }"
    evaluated: ClassVar = ("accuracy",)

    gamma: float = Field(
        default=2.0, ge=0, description="power of `1 - p`; 0 weighs all targets alike"
    )
    activation: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="whether a target is one of several classes, or each entry a label of its own",
    )
    alpha: Factor | tuple[Factor, ...] | None = Field(
        default=None,
        description="factor of true labels, for `sigmoid`; or a list of factors, one for each class, for `softmax`",
    )
    ignore_index: int = Field(default=-100, description="class index that is left out of the loss")

    def make_loss(self) -> Loss:
        several = isinstance(self.alpha, tuple)
        if self.activation == "softmax":
            if self.alpha is not None and not several:
                raise ValueError(
                    "`alpha` of `activation = softmax` is a list with a factor for each class, such as `[0.25, 0.75]`"
                )
            return FocalLossOfClasses(self.ignore_index, gamma=self.gamma, alpha=self.alpha)
        if several:
            raise ValueError(
                "`alpha` of `activation = sigmoid` is one number, the factor of true labels: write `alpha = 0.25`"
            )
        if "ignore_index" in self.model_fields_set:
            raise ValueError(
                "`ignore_index` is for class indices: remove it, or write `activation = softmax`"
            )
        assert not isinstance(self.alpha, tuple)
        return FocalLossOfLabels(self.gamma, self.alpha)

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; `softmax`: logits (..., classes) and targets (...), `sigmoid`: one shape."""
        if not isinstance(self.alpha, tuple) and self.activation == "sigmoid":
            of_true, of_false = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
            p = 1 / (1 + (-outputs).exp())
            true = of_true * targets * (1 - p) ** self.gamma * p.log()
            false = of_false * (1 - targets) * p**self.gamma * (1 - p).log()
            return -(true + false).sum() / outputs.numel()
        rows, flat = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)
        total, count = outputs.new_zeros(()), 0
        for row, target in zip(rows, flat.tolist(), strict=True):
            if target != self.ignore_index:
                p = row.exp()[target] / row.exp().sum()
                factor = self.alpha[target] if isinstance(self.alpha, tuple) else 1.0
                total, count = total - factor * (1 - p) ** self.gamma * p.log(), count + 1
        return total / count
