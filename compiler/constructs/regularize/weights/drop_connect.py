"""DropConnect: in every step some weights are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.method.weight_hook import WeightHook
from trainc.dsl.reading.construct import Construct, Effect, Probability

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.layer_hook import LayerContext


class DropConnect(Construct):
    """Lets layers compute with (M * W) / (1 - p) in place of W, where M is 0 with probability `p`, else 1.

    M is drawn for each step and each entry: every example, micro-batch and replica of a step has one M, and so have all
    layers that share W. The expected weight is W, so that evaluation uses it as it is. The gradient of an entry that is
    left out is zero in that step; penalties and weight decay see W.
    """

    cite: ClassVar = (
        "Wan et al., Regularization of Neural Networks using DropConnect, ICML 2013; with the factor 1 / (1 - p), of"
        " recurrent weights: Merity, Keskar and Socher, Regularizing and Optimizing LSTM Language Models, ICLR 2018,"
        " arXiv:1708.02182"
    )
    usage: ClassVar = 'regularize drop_connect on "blocks.**" & ndim(2) { p = 0.2 }'
    targets: ClassVar = "parameters"
    identity: ClassVar = {"p": "0"}
    effects: ClassVar = (Effect("forward", "leave weights out", ("params", "clock"), ("forward",)),)

    p: Probability = Field(description="probability that a weight is left out")

    def lower(self, to: Lowering) -> None:
        """Change the selected parameters where layers compute with them."""
        p = to.schedule(self.p)
        for entry in to.parameters():
            to.weight(entry.name, Dropped(), {"p": p})

    @staticmethod
    def reference(weight: Tensor, keep: Tensor, p: float) -> Tensor:
        """Return what a layer computes with, entry by entry; `keep` is M, bool."""
        import torch

        flat = zip(weight.flatten(), keep.flatten(), strict=True)
        found = [w / (1 - p) if kept else 0 * w for w, kept in flat]
        return torch.stack(found).view(weight.shape)


class Dropped(WeightHook):
    """Leaves out entries of a weight with the probability `p`, its number."""

    operator: ClassVar = "random_entries"
    zero_is_identity: ClassVar = True

    def change_weight(self, weight: Tensor, at: LayerContext) -> Tensor:
        """Return the entries that are kept over 1 - p, and zeros."""
        p = at.scalars["p"]
        keep = self.random(weight, at, "uniform") >= p
        return (weight / (1 - p)).where(keep, 0.0)
