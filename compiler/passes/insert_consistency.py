"""Insert noise sites and a consistency term between the two views of every example."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from trainc.compiler.errors import SiteMissing, SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph, call_site, module_stack
from trainc.compiler.method.sites import NoiseSite, Pairing, Rewrite
from trainc.compiler.passes.pass_base import Pass
from trainc.kernels.loss import cross_entropy_consistency as _loss  # noqa: F401  (registers the operator)
from trainc.kernels.noise import multiplicative_noise as _noise  # noqa: F401  (registers the operator)

aten = torch.ops.aten
KEY, FIRST_EXAMPLE = "key", "first_example"
DROPOUT = {aten.dropout.default, aten.dropout_.default}
UNSHARED = {
    aten.scaled_dot_product_attention.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.bernoulli_.float,
    aten.rand_like.default,
    aten.randn_like.default,
}
LOSS = "loss"


@dataclass(frozen=True)
class InsertConsistency(Pass):
    """Multiplies site outputs by noise, shares dropout between the views and pairs the loss."""

    name: ClassVar[str] = "insert_consistency"
    purpose: ClassVar[str] = (
        "add noise at its sites and the distance between the two views to the loss"
    )
    after: ClassVar[tuple[str, ...]] = ("fuse_norms", "instrument_norms")
    exact: ClassVar[bool] = False
    widens: ClassVar[frozenset[str]] = frozenset({"task"})

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the noise sites, and the loss when the views are paired."""
        return (*(site.module for site in rewrite.noises), *((LOSS,) if rewrite.pairing else ()))

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite noise sites, dropout and loss."""
        served: list[str] = []
        if rewrite.pairing is not None:
            self.share_dropout(forward)
        missing = [s.module for s in rewrite.noises if not self.add_noise(forward, s)]
        if missing:
            raise SiteMissing(self.name, missing)
        served += [site.module for site in rewrite.noises]
        if rewrite.pairing is not None:
            self.pair(forward, rewrite.pairing)
            served.append(LOSS)
        return served

    def add_noise(self, forward: ForwardGraph, site: NoiseSite) -> bool:
        """Put noise behind every call of a module; False when the module is not in the graph."""
        ends = _results(forward, site.module)
        for node in ends:
            value = node.meta["val"]
            if value.dim() < 2 or value.shape[0] != forward.rows:
                raise SiteUnfit(
                    site.module,
                    f"the first axis of its output {list(value.shape)} is not the axis of "
                    f"the {forward.rows} examples",
                )
            readers = list(node.users)
            sigma, key = forward.scalar(site.scalar), forward.scalar(KEY)
            first = forward.scalar(FIRST_EXAMPLE) if FIRST_EXAMPLE in forward.available else None
            with forward.graph.inserting_after(node):
                noisy = forward.call(
                    torch.ops.trainc.multiplicative_noise.default,
                    (node, sigma, key, site.index, forward.views, site.share, first),
                    node,
                )
            for reader in readers:
                reader.replace_input_with(node, noisy)
        return bool(ends)

    def share_dropout(self, forward: ForwardGraph) -> None:
        """Let the views share each dropout mask, so that their distance is the noise's alone."""
        for node in forward.calls():
            if node.target in UNSHARED and _is_random(node):
                where = call_site(node) or "the model"
                forward.notes.append(
                    f"`{where}` draws from {node.target} for each view: its masks are not shared"
                )
            if node.target not in DROPOUT or not node.args[2] or node.args[1] == 0.0:
                continue
            x, p, _ = node.args
            assert isinstance(x, fx.Node)
            rows = x.meta["val"].shape[0]
            if rows % forward.rows:
                forward.notes.append(
                    f"`{call_site(node)}` drops along another axis: its masks are not shared"
                )
                continue
            multiply = aten.mul.Tensor if node.target is aten.dropout.default else aten.mul_.Tensor
            with forward.graph.inserting_before(node):
                half = forward.call(aten.slice.Tensor, (x, 0, 0, rows // forward.views), node)
                ones = forward.call(aten.ones_like.default, (half,), node)
                mask = forward.call(aten.dropout.default, (ones, p, True), node)
                masks = forward.call(aten.cat.default, ([mask] * forward.views,), node)
                result = forward.call(multiply, (x, masks), node)
            node.replace_all_uses_with(result)
            forward.graph.erase_node(node)

    def pair(self, forward: ForwardGraph, pairing: Pairing) -> None:
        """Add the weighted distance between the views to the task's loss."""
        task, logits = forward.result("task"), forward.result("logits")
        weight = forward.scalar(pairing.weight)
        with forward.graph.inserting_before(forward.output):
            if forward.task.name == "cross_entropy" and pairing.views == 2:
                results = _fused_loss(forward, pairing, logits, weight)
            else:
                results = _plain_loss(forward, pairing, task, logits, weight)
        forward.set_results(
            dict(zip(("loss", "task", "consistency"), results, strict=True)) | {"logits": logits}
        )


def _fused_loss(
    forward: ForwardGraph, pairing: Pairing, logits: fx.Node, weight: fx.Node
) -> list[fx.Node]:
    targets = next(
        n for n in forward.graph.nodes if n.op == "placeholder" and n.target == "targets"
    )
    form = forward.task
    fused = forward.call(
        torch.ops.trainc.cross_entropy_consistency.default,
        (logits, targets, weight, pairing.distance, form.ignore_index, form.label_smoothing),
        logits,
    )
    return [forward.call(operator.getitem, (fused, i), logits) for i in range(3)]


def _plain_loss(
    forward: ForwardGraph, pairing: Pairing, task: fx.Node, logits: fx.Node, weight: fx.Node
) -> list[fx.Node]:
    """Spell the distance out: the mean over leading dims of a distance over the last."""

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return forward.call(target, args, forward.output)

    if pairing.views != 2:
        raise SiteUnfit(LOSS, f"a distance is between 2 views, not {pairing.views}")
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
    loss = call(aten.add.Tensor, task, call(aten.mul.Tensor, weight, distance))
    return [loss, task, distance]


def _results(forward: ForwardGraph, module: str) -> list[fx.Node]:
    """Return the node behind each call of a module: the one inside it that is read outside."""
    calls: dict[str, list[fx.Node]] = {}
    for node in forward.calls():
        for key, path in module_stack(node).items():
            if path == module:
                calls.setdefault(key, []).append(node)
    ends: list[fx.Node] = []
    for nodes in calls.values():
        inside = set(nodes)
        leaving = [n for n in nodes if any(user not in inside for user in n.users)]
        if len(leaving) != 1:
            raise SiteUnfit(
                module, f"it has {len(leaving)} results in the graph, and noise needs exactly one"
            )
        ends += leaving
    return ends


def _is_random(node: fx.Node) -> bool:
    if node.target is aten.scaled_dot_product_attention.default:
        given = (
            dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), node.args, strict=False))
            | node.kwargs
        )
        return bool(given.get("dropout_p", 0.0))
    return True
