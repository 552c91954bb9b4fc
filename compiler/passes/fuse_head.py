"""Fuse a linear head with the loss of its logits, so that those of a large vocabulary are never held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import OUTPUTS, ForwardGraph, call_site, strip_casts
from trainc.compiler.graph.sizes import size_at_capture
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import TERM, JointOperator
from trainc.compiler.passes.pass_base import LOSS, LossPass
from trainc.kernels.loss import linear_cross_entropy as _registered  # noqa: F401
from trainc.kernels.loss.linear_cross_entropy_consistency import chunk_rows

aten = torch.ops.aten
_SWAPS = {aten.transpose.int, aten.permute.default}

# With two views backward computes the logits again: 4 products of the head's size instead of 3, for less memory.
# It is done where logits are what fills the memory: a vocabulary of CLASSES or more, TIMES_WIDTH
# times the head's input width, and CHUNKS chunks of rows or more, so that all logits and their
# gradient would take 2 * CHUNKS times the memory of one chunk.
CLASSES = 8192
TIMES_WIDTH = 4
CHUNKS = 4

_HELD = "`chunks` of the loss does nothing, and the logits are held"


@dataclass(frozen=True)
class FuseHead(LossPass):
    """Replaces a linear head and the loss of its logits by one operator; `always` at any size."""

    always: bool = False

    name = "fuse_head"
    purpose = "compute the loss of a large vocabulary without holding its logits"
    after = ("fuse_loss",)
    widens = frozenset({"data_loss"})

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the loss where it has a term of two views, or is asked for in chunks."""
        return (LOSS,) if rewrite.joint is not None or rewrite.chunks is not None else ()

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite the loss if nothing else reads the head's logits.

        The output `logits` stays for the passes; no step reads it, and what nothing reads is
        removed when the graph is differentiated.
        """
        term = rewrite.joint
        if term is None:
            self.fuse_chunks(forward, rewrite)
            return [LOSS]
        assert term.joint is not None
        always, fused = self.always or bool(rewrite.chunks), False
        if not _is_read(forward, rewrite):
            for loss in forward.calls():
                if loss.target is term.joint.target:
                    fused |= self.fuse(forward, loss, term.joint, always)
        if rewrite.chunks and not fused:
            forward.warnings.append(
                f"{_HELD}: a linear layer does not give them, or more than the loss reads them"
            )
        return [LOSS]

    def fuse(
        self, forward: ForwardGraph, loss: fx.Node, joint: JointOperator, always: bool
    ) -> bool:
        """Replace one loss of two views and its head, unless something else reads the logits or it is not faster.

        Returns whether it did.
        """
        logits, *rest = loss.args
        assert isinstance(logits, fx.Node)
        readers = set(logits.users) - {loss, forward.output}
        product = _product(logits)
        if product is None or readers:
            return False
        x, weight, bias = product
        with forward.graph.inserting_before(loss):
            head = _head(forward, logits, weight)
            if not _pays(x.meta["val"], head.meta["val"], bias, always):
                return False
            results = forward.results_of(joint.head_target, (x, head, bias, *rest), logits, 3)
        for user in list(loss.users):
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
        forward.notes.append(_fused(logits))
        return True

    def fuse_chunks(self, forward: ForwardGraph, rewrite: Rewrite) -> None:
        """Replace a cross-entropy and its head, or say why not: in a run, where a number of chunks is written."""
        assert rewrite.chunks is not None
        logits = forward.result("logits")
        found = _product(_before_cast(logits))
        reason = _obstacle(forward, rewrite)
        if found is not None and reason is None:
            reason = self._fused_chunks(forward, rewrite, *found)
        elif reason is None:
            reason = "a linear layer does not give them as they are"
        if reason is None:
            forward.notes.append(_fused(logits))
        else:
            told = forward.warnings if rewrite.chunks else forward.notes
            told.append(f"{_HELD}: {reason}")

    def _fused_chunks(
        self,
        forward: ForwardGraph,
        rewrite: Rewrite,
        x: fx.Node,
        weight: fx.Node,
        bias: fx.Node | None,
    ) -> str | None:
        """Let one operator compute the loss; return why not, else None."""
        product, spec = _before_cast(forward.result("logits")), forward.loss
        place = next(n for n, value in forward.values.items() if value is forward.first_targets)
        (targets,) = forward.graph.find_nodes(op="placeholder", target=place)
        if x.meta["val"].dim() != forward.first_targets.dim() + 1:
            return "the head's inputs have other axes than the targets"
        with forward.graph.inserting_before(forward.output):
            head = _head(forward, product, weight)
            always = self.always or bool(rewrite.chunks)
            if not _pays(x.meta["val"], head.meta["val"], bias, always):
                return "they are small, or in another dtype than the head"
            wanted = [_trains(forward, one) for one in (x, head, bias)]
            numbers = spec.ignore_index, spec.label_smoothing, rewrite.chunks
            given = (x, head, bias, targets, *numbers, wanted)
            operator = torch.ops.trainc.linear_cross_entropy.default
            (loss,) = forward.results_of(operator, given, product, 1)
        kept = {name: forward.result(name) for name in forward.outputs}
        forward.set_results(kept | {"data_loss": loss})
        return None


def _pays(x: Tensor, head: Tensor, bias: fx.Node | None, always: bool) -> bool:
    classes, width = head.shape
    fits = x.dtype == head.dtype and (bias is None or bias.meta["val"].dim() == 1)
    rows = size_at_capture(x.numel() // max(width, 1) // 2)
    many = rows >= CHUNKS * chunk_rows(width, classes, x.device.type)
    large = classes >= max(CLASSES, TIMES_WIDTH * width)
    return fits and (always or (large and many))


def _is_read(forward: ForwardGraph, rewrite: Rewrite) -> bool:
    """Say whether something outside of the graph reads the logits."""
    others = (one for one in rewrite.terms.values() if not one.of_parameters)
    return bool(rewrite.observers) or any(TERM + one.label not in forward.outputs for one in others)


def _obstacle(forward: ForwardGraph, rewrite: Rewrite) -> str | None:
    """Return why the logits of one view must be held; None where the loss alone reads them."""
    logits = forward.result("logits")
    if not forward.loss.is_cross_entropy_of(logits.meta["val"], forward.first_targets):
        return "the loss is no cross-entropy of class indices, or of classes on another axis than the last"
    if rewrite.views > 1:
        return "the head has several views of each example"
    if _is_read(forward, rewrite):
        return "a term of the loss, or an `observe` clause, reads them"
    found: set[fx.Node] = set()
    pending = [_before_cast(logits)]
    while pending:
        new = set(pending.pop().users) - found
        found |= new
        pending += new
    read = [n for n in forward.outputs if n not in OUTPUTS and forward.result(n) in found]
    return f"`{read[0]}` is computed from them" if read else None


def _trains(forward: ForwardGraph, node: fx.Node | None) -> bool:
    """Say whether a gradient of a head's input, weight or bias may be asked for."""
    if node is None:
        return False
    name = forward.tensor_name(node)
    return name is None or forward.tensors[forward.canonical_name(name)].requires_grad


def _before_cast(logits: fx.Node) -> fx.Node:
    """Return the 16-bit logits that are cast to the dtype in which a loss is summed anyway, or else the logits."""
    source = strip_casts(logits)
    narrow, wide = source.meta["val"], logits.meta["val"]
    same = (
        narrow.device == wide.device
        and torch.promote_types(narrow.dtype, torch.float32) == wide.dtype
    )
    return source if same else logits


def _fused(logits: fx.Node) -> str:
    return f"`{call_site(logits) or 'the model'}` and the loss are one operator: the logits are not held in memory"


def _head(forward: ForwardGraph, product: fx.Node, weight: fx.Node) -> fx.Node:
    """Return the weight (C, K) of a product: of one with (K, C) undo or take the transpose."""
    if product.target is aten.linear.default:
        return weight
    return _untransposed(weight) or forward.call(aten.t.default, (weight,), product)


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
