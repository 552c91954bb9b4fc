"""The loss of a batch's logits, with or without the distance between two views of every example."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trainc.compiler.method.loss import Loss
from trainc.compiler.method.sites import Pairing
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency


def paired_loss(
    loss_fn: Loss,
    pairing: Pairing | None,
    logits: Tensor,
    targets: Tensor,
    scalars: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and its terms by name where it has several.

    With a pairing the first half of `logits` is one view of the examples, the second half the other. The terms are
    then `data_loss`, of the first view, and `consistency`, the distance before its weight.
    """
    if pairing is None:
        return loss_fn(logits, targets), {}
    weight = scalars[pairing.weight]
    if loss_fn.name == "cross_entropy":
        loss, data_loss, distance = cross_entropy_consistency(
            logits, targets, weight, pairing.distance, loss_fn.ignore_index, loss_fn.label_smoothing
        )
    else:
        one, two = logits.chunk(2)
        data_loss, distance = loss_fn(one, targets), (one - two).square().sum(-1).mean()
        loss = data_loss + weight * distance
    return loss, {"data_loss": data_loss.detach(), "consistency": distance.detach()}
