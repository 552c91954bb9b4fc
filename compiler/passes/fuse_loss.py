"""Compute the loss and a term that compares two views by one operator."""

from __future__ import annotations

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import TERM
from trainc.compiler.passes.pass_base import LOSS, LossPass


class FuseLoss(LossPass):
    """Replaces a cross-entropy and a term of both views by one operator; other losses stay beside the term."""

    name = "fuse_loss"
    purpose = "compute the loss and the distance of two views by one operator"
    after = ("share_dropout",)
    widens = frozenset({"data_loss"})

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite the loss if it is a cross-entropy."""
        term, spec = rewrite.joint, forward.loss
        assert term is not None
        assert term.joint is not None
        assert term.weight is not None
        logits = forward.result("logits")
        if not spec.is_cross_entropy_of(logits.meta["val"], forward.first_targets):
            return [LOSS]
        place = next(n for n, value in forward.values.items() if value is forward.first_targets)
        (targets,) = forward.graph.find_nodes(op="placeholder", target=place)
        options = term.joint.options(spec.ignore_index, spec.label_smoothing)
        weight = forward.scalar(term.weight)
        with forward.graph.inserting_before(forward.output):
            given = (logits, targets, weight, *options)
            _, data_loss, value = forward.results_of(term.joint.target, given, logits, 3)
        own = {"data_loss": data_loss, TERM + term.label: value}
        forward.set_results({n: forward.result(n) for n in forward.outputs} | own)
        return [LOSS]
