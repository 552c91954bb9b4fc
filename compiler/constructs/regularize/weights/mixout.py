"""Mixout: in every step some weights are those that training starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.method.weight_hook import WeightHook
from trainc.dsl.reading.construct import Construct, Effect, Probability

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.layer_hook import LayerContext


class Mixout(Construct):
    """Lets layers compute with [M * W + (1 - M) * W0 - p W0] / (1 - p) in place of W.

    W0 are the weights with which the program was first built, also after a resume. M is 0 with probability `p`, else 1,
    drawn for each step and each entry of the whole matrix: every example, micro-batch and replica of a step has one M.
    The expected weight is W, which evaluation uses; the gradient of W is M / (1 - p) times that of what the layer
    computes with, so that an entry with M = 0 has none. With W0 = 0 it is DropConnect.
    """

    cite: ClassVar = (
        "Lee, Cho and Kang, Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models,"
        " ICLR 2020, arXiv:1909.11299"
    )
    usage: ClassVar = 'regularize mixout on "blocks.**" & ndim(2) { p = 0.7 }'
    targets: ClassVar = "parameters"
    identity: ClassVar = {"p": "0"}
    effects: ClassVar = (
        Effect("forward", "mix weights with their start", ("params", "clock"), ("forward",)),
        Effect("observe", "keep the weights at the start", ("params",)),
    )

    p: Probability = Field(description="probability that a weight is that of the start")

    def lower(self, to: Lowering) -> None:
        """Keep the start, and change the selected parameters where layers compute with them."""
        from trainc.runtime.companion.start import Anchors

        names = [entry.name for entry in to.parameters()]
        to.refuse_shards(
            names,
            "it keeps the start of whole weights",
            "Use DistributedDataParallel, or remove the clause",
        )
        starts = {name: to.tensor(name).detach().clone() for name in names}
        p = to.schedule(self.p)
        for name, start in starts.items():
            to.weight(name, Mixed(), {"p": p}, {"start": start})
        to.action(Anchors(to.label, lambda: {name: to.tensor(name) for name in names}, starts))

    @staticmethod
    def reference(weight: Tensor, start: Tensor, keep: Tensor, p: float) -> Tensor:
        """Return what a layer computes with, by definition; `keep` is M, of the weight's shape."""
        m = keep.to(weight.dtype)
        return (m * weight + (1 - m) * start - p * start) / (1 - p)


class Mixed(WeightHook):
    """Mixes a weight with `start`, with the probability `p`."""

    operator: ClassVar = "random_entries"
    zero_is_identity: ClassVar = True

    def change_weight(self, weight: Tensor, at: LayerContext) -> Tensor:
        """Return the weight where it is kept, and the start elsewhere."""
        p, start = at.scalars["p"], at.scalars["start"].to(weight.device, weight.dtype)
        keep = self.random(weight, at, "uniform") >= p
        return (weight.where(keep, start) - p * start) / (1 - p)
