"""The loss of a micro-batch with the terms that clauses add, as the bound modules compute it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainc.compiler.method.loss import LOSS_WEIGHT, PARAMETER_WEIGHT
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import Forward, add_terms


def losses_of_views(
    losses: Losses, outputs: Mapping[str, Any], targets: Any, views: int, mean_loss: bool
) -> dict[str, Tensor]:
    """Return every loss by its name, of the first view or of all; `outputs` hold what each is of, by its name."""
    return {
        part.label: part.loss.of_views(outputs[part.label], part.targets(targets), views, mean_loss)
        for part in losses.parts
    }


def nothing_of(outputs: Iterable[Any]) -> Tensor:
    """Return 0, whatever outputs hold, with gradients of zeros to them: what made them is measured and averaged."""
    zeros = [
        one.where(torch.zeros_like(one, dtype=torch.bool), 0.0).sum()
        for one in pytree.tree_leaves([*outputs])
        if isinstance(one, Tensor) and one.is_floating_point()
    ]
    return torch.stack(zeros).sum() if zeros else torch.zeros(())


def total_loss(
    forward: Forward, losses: Losses, rewrite: Rewrite, loss_weight: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the loss, the total to differentiate, and by name the losses of a sum and the terms of clauses.

    `data_loss` is among them if there are terms. A cross-entropy and a term of both views are computed by one operator
    where there is one.
    """
    scalars, targets = forward.tensors, forward.targets
    losses.use(scalars)
    first, loss_fn = losses.parts[0], losses.first
    output, joint = forward.outputs[first.label], rewrite.joint
    counts = losses.counts_now(first, scalars)
    if joint is not None and not (counts and loss_fn.is_cross_entropy_of(output, targets)):
        joint = None
    values: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    if joint is not None:
        assert joint.joint is not None
        assert joint.weight is not None
        options = joint.joint.options(loss_fn.ignore_index, loss_fn.label_smoothing)
        found = joint.joint.target(output, targets, scalars[joint.weight], *options)
        own[first.label], values[joint.label] = found[1], found[2]
    wanted = [p for p in losses.parts if p.label not in own and losses.counts_now(p, scalars)]
    rest = Losses(wanted), forward.outputs, forward.all_targets
    own |= losses_of_views(*rest, rewrite.views, rewrite.mean_loss)
    data_loss = losses.add(own, scalars)
    for part in losses.parts:
        if part.label not in own:
            data_loss = data_loss + nothing_of([forward.outputs[part.label]])
    if losses.is_sum:
        values |= own
    if not rewrite.terms:
        total = data_loss if loss_weight == 1.0 else data_loss * scalars[LOSS_WEIGHT]
        return data_loss, total, values
    terms = [term for term in rewrite.terms.values() if counts or term.over != "targets"]
    for term in terms:
        if term.label not in values:
            values[term.label] = term.evaluate(forward)
    loss, total = add_terms(data_loss, terms, values, scalars)
    if rewrite.reads_passes:
        values["data_loss"] = data_loss
    return loss, total, values


def loss_without_targets(
    forward: Forward, rewrite: Rewrite
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what `total_loss` does for a micro-batch without a part in the loss of its step, whose mean may be NaN.

    It is 0 with gradients of zeros, which replicas wait for, or the terms over examples; where it is the last of a
    process that shards weights, the terms over parameters are added.
    """
    if rewrite.of_examples:
        return terms_over_examples(forward, rewrite)
    loss = nothing_of(forward.outputs.values())
    if PARAMETER_WEIGHT not in forward.tensors:
        return loss.detach(), loss, {}
    terms = [term for term in rewrite.terms.values() if term.of_parameters]
    values = {term.label: term.evaluate(forward) for term in terms}
    return loss.detach(), add_terms(loss, terms, values, forward.tensors)[1], values


def terms_over_examples(
    forward: Forward, rewrite: Rewrite
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what `total_loss` does for a micro-batch without counted targets: the terms over examples alone."""
    terms = [term for term in rewrite.terms.values() if term.over == "examples"]
    values = {term.label: term.evaluate(forward) for term in terms}
    weighted = [values[term.label] * forward.tensors[term.weight] for term in terms if term.weight]
    total = torch.stack(weighted).sum()
    return total, total, values
