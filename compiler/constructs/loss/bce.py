"""Binary cross-entropy: the loss of yes or no, also of several labels at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from trainc.compiler.constructs.loss._base import ElementwiseLoss, LossConstruct
from trainc.compiler.method.loss import LossMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss


@dataclass(eq=False)
class BinaryCrossEntropyLoss(ElementwiseLoss):
    """Mean of -pos_weight t log sigmoid(x) - (1 - t) log sigmoid(-x) over all entries; x and t have one shape.

    Equal to torch.nn.functional.binary_cross_entropy_with_logits bit for bit.
    """

    name = "bce"
    pos_weight: float | tuple[float, ...] | None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import binary_cross_entropy_with_logits

        if not targets.is_floating_point():
            raise LossMismatch(
                "`loss bce` needs the probability of each label, 0, 1 or between, as floating-point numbers: give"
                " `targets.float()`"
            )
        logits, targets = self.pair(outputs, targets)
        weight = None if self.pos_weight is None else logits.new_tensor(self.pos_weight)
        if weight is not None and weight.dim() and weight.shape != logits.shape[-1:]:
            raise LossMismatch(
                f"`pos_weight` has {len(weight)} numbers, and the logits are {list(logits.shape)}:"
                " give a number for each label of their last axis, or one for all"
            )
        return binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)

    def misfit(self, targets: Tensor) -> str | None:
        """Return what to write where a target is no probability."""
        if not (targets.is_floating_point() and targets.numel()):
            return None
        low, high = (float(end) for end in targets.aminmax())
        if (low >= 0 and high <= 1) or low != low:
            return None
        return (
            f"the targets of `loss bce` are from {low:.4g} to {high:.4g}, and must be probabilities, from 0 to 1. No"
            " value is ignored: leave out examples without a label, or give losses of single labels a `target` each"
        )

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[float, float]]:
        """Return how many of the labels were predicted, as `accuracy`: at a probability of one half."""
        right = (outputs > 0) == (targets > 0.5)
        return {"accuracy": (float(right.sum()), right.numel())}


class BinaryCrossEntropy(LossConstruct):
    """Trains on the mean of `-pos_weight t log p - (1 - t) log(1 - p)` over all entries, with `p = sigmoid(output)`.

    The targets t, floating-point numbers in [0, 1], have the output's shape: one label for each entry,
    or several for an example, of which any number may be true at once.
    """

    cite: ClassVar = "Cox, J. R. Stat. Soc. B 20 (1958) 215: the regression of binary sequences"
    usage: ClassVar = "loss bce { pos_weight = 2 }"
    evaluated: ClassVar = ("accuracy",)

    pos_weight: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] | None = (
        Field(
            default=None,
            description="factor on the loss of what is true: a number, or one for each label of the last axis",
        )
    )

    def make_loss(self) -> Loss:
        return BinaryCrossEntropyLoss(self.pos_weight)

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; both of one shape."""
        weight = outputs.new_tensor(1.0 if self.pos_weight is None else self.pos_weight)
        true, false = (1 / (1 + (sign * outputs).exp()) for sign in (-1, 1))
        each = -weight * targets * true.log() - (1 - targets) * false.log()
        return each.sum() / each.numel()
