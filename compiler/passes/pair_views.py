"""Add the distance between the two views of every example to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.method.sites import Pairing, Rewrite
from trainc.compiler.passes.pass_base import LOSS, PairingPass
from trainc.kernels.loss import cross_entropy_consistency as _loss  # noqa: F401  (registers the operator)

aten = torch.ops.aten


class PairViews(PairingPass):
    """Adds the weighted distance between the views' logits to the loss."""

    name = "pair_views"
    purpose = "add the distance between the two views to the loss"
    after = ("add_noise", "share_dropout")
    widens = frozenset({"data_loss"})

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite the loss."""
        pairing = rewrite.pairing
        assert pairing is not None
        data_loss, logits = forward.result("data_loss"), forward.result("logits")
        weight = forward.scalar(pairing.weight)
        with forward.graph.inserting_before(forward.output):
            if forward.loss.name == "cross_entropy":
                results = _fused_loss(forward, pairing, logits, weight)
            else:
                results = _composed_loss(forward, pairing, data_loss, logits, weight)
        names = ("loss", "data_loss", "consistency")
        forward.set_results(dict(zip(names, results, strict=True)) | {"logits": logits})
        return [LOSS]


def _fused_loss(
    forward: ForwardGraph, pairing: Pairing, logits: fx.Node, weight: fx.Node
) -> list[fx.Node]:
    (targets,) = forward.graph.find_nodes(op="placeholder", target="targets")
    spec = forward.loss
    given = (logits, targets, weight, pairing.distance, spec.ignore_index, spec.label_smoothing)
    target = torch.ops.trainc.cross_entropy_consistency.default
    return forward.results_of(target, given, logits, 3)


def _composed_loss(
    forward: ForwardGraph, pairing: Pairing, data_loss: fx.Node, logits: fx.Node, weight: fx.Node
) -> list[fx.Node]:
    """Compose the loss from ATen operators: the distance is over the last dim, its mean over the others."""

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return forward.call(target, args, forward.output)

    if logits.meta["val"].dtype in (torch.float16, torch.bfloat16):
        logits = call(aten.to.dtype, logits, torch.float32)
    first = call(aten.slice.Tensor, logits, 0, 0, forward.examples)
    second = call(aten.slice.Tensor, logits, 0, forward.examples, forward.rows)
    last = [-1] if logits.meta["val"].dim() > 1 else []
    if pairing.distance == "mse":
        gap = call(aten.sub.Tensor, first, second)
        each = call(aten.mul.Tensor, gap, gap)
        scale = 1.0
    else:
        log_p, log_q = (call(aten.log_softmax.int, half, -1) for half in (first, second))
        gap = call(aten.sub.Tensor, log_p, log_q)
        lead = call(aten.sub.Tensor, call(aten.exp.default, log_p), call(aten.exp.default, log_q))
        each = call(aten.mul.Tensor, lead, gap)
        scale = 0.5
    rows = call(aten.sum.dim_IntList, each, last) if last else each
    distance = call(aten.mean.default, rows)
    if scale != 1.0:
        distance = call(aten.mul.Tensor, distance, scale)
    loss = call(aten.add.Tensor, data_loss, call(aten.mul.Tensor, weight, distance))
    return [loss, data_loss, distance]
