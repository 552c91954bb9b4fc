"""Fuse a linear head with the loss of two views, so that the logits of a large vocabulary are never held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import ForwardGraph, call_site
from trainc.compiler.graph.sizes import size_at_capture
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import TERM, JointOperator
from trainc.compiler.passes.pass_base import LOSS, LossPass
from trainc.kernels.loss.linear_cross_entropy_consistency import chunk_rows

aten = torch.ops.aten
_SWAPS = {aten.transpose.int, aten.permute.default}

# Backward computes the logits again: 4 products of the head's size instead of 3, for less memory.
# It is done where logits are what fills the memory: a vocabulary of CLASSES or more, TIMES_WIDTH
# times the head's input width, and CHUNKS chunks of rows or more, so that all logits and their
# gradient would take 2 * CHUNKS times the memory of one chunk.
CLASSES = 8192
TIMES_WIDTH = 4
CHUNKS = 4


@dataclass(frozen=True)
class FuseHead(LossPass):
    """Replaces a linear head and the loss of its logits by one operator; `always` at any size."""

    always: bool = False

    name = "fuse_head"
    purpose = "compute the loss of a large vocabulary without holding its logits"
    after = ("fuse_loss",)

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite the loss if nothing else reads the head's logits."""
        term = rewrite.joint
        assert term is not None
        assert term.joint is not None
        others = (one for one in rewrite.terms.values() if not one.of_parameters)
        read = rewrite.observers or any(TERM + one.label not in forward.outputs for one in others)
        if not read:
            for loss in forward.calls():
                if loss.target is term.joint.target:
                    self.fuse(forward, loss, term.joint)
        return [LOSS]

    def fuse(self, forward: ForwardGraph, loss: fx.Node, joint: JointOperator) -> None:
        """Replace one loss and its head, unless something else reads the logits or it is not faster.

        The output `logits` stays for the passes; no step reads it, and what nothing reads is
        removed when the graph is differentiated.
        """
        logits, *rest = loss.args
        assert isinstance(logits, fx.Node)
        readers = set(logits.users) - {loss, forward.output}
        product = _product(logits)
        if product is None or readers:
            return
        x, weight, bias = product
        with forward.graph.inserting_before(loss):
            head = weight
            if logits.target is not aten.linear.default:  # (K, C): undo or take the transpose
                head = _untransposed(weight) or forward.call(aten.t.default, (weight,), logits)
            if not self._pays(x.meta["val"], head.meta["val"], bias):
                return
            results = forward.results_of(joint.head_target, (x, head, bias, *rest), logits, 3)
        for user in list(loss.users):
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
        forward.notes.append(
            f"`{call_site(logits) or 'the model'}` and the loss are one operator: the logits are not held in memory"
        )

    def _pays(self, x: Tensor, head: Tensor, bias: fx.Node | None) -> bool:
        classes, width = head.shape
        fits = x.dtype == head.dtype and (bias is None or bias.meta["val"].dim() == 1)
        rows = size_at_capture(x.numel() // max(width, 1) // 2)
        many = rows >= CHUNKS * chunk_rows(width, classes, x.device.type)
        large = classes >= max(CLASSES, TIMES_WIDTH * width)
        return fits and (self.always or (large and many))


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return the input, weight and bias of a linear layer, whichever operators compute it."""
    if node.kwargs or len(node.args) < 2:
        return None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target is aten.mm.default:
        (x, weight), bias = node.args, None
    elif node.target is aten.addmm.default and len(node.args) == 3:
        bias, x, weight = node.args
    else:
        return None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    assert bias is None or isinstance(bias, fx.Node)
    return x, weight, bias


def _untransposed(weight: fx.Node) -> fx.Node | None:
    """Return the matrix that a node is the transpose of; None where it is not a transpose."""
    source = weight.args[0] if weight.args else None
    plain = weight.target is aten.t.default or (
        weight.target in _SWAPS and weight.meta["val"].dim() == 2 and not _keeps(weight)
    )
    return source if plain and isinstance(source, fx.Node) else None


def _keeps(weight: fx.Node) -> bool:
    """Say whether a transpose or permutation leaves the axes of a matrix as they are."""
    _, *axes = weight.args
    found = axes[0] if isinstance(axes[0], (list, tuple)) else axes
    first, second = (int(axis) % 2 for axis in found)  # type: ignore[arg-type]
    permuted = weight.target is aten.permute.default
    return (first, second) == (0, 1) if permuted else first == second
