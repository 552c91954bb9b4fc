"""Add up the micro-batches of a step: losses, loss terms and statistics, over all replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trainc.compiler.per_example.micro_batch import MicroBatchResult
from trainc.compiler.per_example.statistics import Statistics
from trainc.compiler.program.distributed import require_own_gradients
from trainc.runtime.step.record import Step
from trainc.runtime.step.replicas import Replicas

_TOLERANCE = 1e-3
"""How far from 1 the sum of a step's loss weights may be: they may have 16 bits."""


def add_results(
    step: Step,
    results: Sequence[MicroBatchResult],
    statistics: Statistics,
    replicas: Replicas | None,
) -> None:
    """Add what the micro-batches left to the step; with replicas the step is then that of all of them.

    Raises SiteError where statistics did not arrive, or where replicas have no gradients of their own.
    """
    if any(statistics.batch_gradients.values()):
        require_own_gradients(replicas, results, list(statistics.batch_gradients))
    for result in results:
        step.loss += float(result.loss)
        for name, value in result.terms.items():
            step.metrics[name] = step.metrics.get(name, 0.0) + float(value)
        if result.weights is not None:
            step.contributions.append(statistics.contribution(result))
    if replicas is not None:
        _gather(step, replicas, list(results[0].terms))


def _gather(step: Step, replicas: Replicas, terms: Sequence[str]) -> None:
    """Combine the step over all replicas, so that each has the same numbers and decides the same.

    Losses are means, as gradients are; samples and tokens are sums.
    """
    own = {"loss": step.loss, "samples": float(step.samples), "tokens": float(step.tokens)}
    own |= {f"term {name}": step.metrics[name] for name in terms}
    step.contributions, means = replicas.gather(step.contributions, own)
    step.loss = means["loss"]
    step.samples, step.tokens = (
        round(means[name] * replicas.size) for name in ("samples", "tokens")
    )
    step.metrics.update({name: means[f"term {name}"] for name in terms})


def check_loss_weights(step: Step) -> None:
    """Raise ValueError if the loss weights of the micro-batches do not sum to 1: their statistics would be wrong.

    A batch without a target that counts has no mean and no weights; `on_nan` says what is done about its loss.
    """
    if not math.isfinite(step.loss):
        return
    total = float(torch.stack([part.weights.sum() for part in step.contributions]).sum())
    if not abs(total - 1) < _TOLERANCE:
        raise ValueError(
            f"the loss weights of the step's micro-batches sum to {total:.4g}, not 1: give each its fraction of the"
            " step's counted targets, `program.loss(batch, loss_weight=...)`, and do not divide the loss yourself"
        )
