"""Per-example gradient norms by brute force: one forward and one backward pass for each example, with any layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from trainc.compiler.per_example.statistics import squared_norm
from trainc.runtime.data.batch import Batch, split_batch
from trainc.runtime.step.record import CalibrationSample
from trainc.runtime.step.replicas import Replicas


def measure_one_by_one(
    batch: Batch,
    weights: Tensor,
    loss_of: Callable[[int, Batch], Tensor],
    parameters: Mapping[str, nn.Parameter],
    replicas: Replicas | None = None,
) -> CalibrationSample:
    """Measure the gradient of every example of a batch, one backward pass each.

    `weights` (examples,) are those of the examples in the loss, `loss_of(i, example)` the loss of example i alone.

    The examples of all `replicas` form one set: they exchange the sum of their gradients, which takes the memory of one
    more gradient.
    """
    squares = {n: weights.new_zeros(len(weights), dtype=torch.float64) for n in parameters}
    sums: dict[str, Tensor] = {}
    for i, one in enumerate(split_batch(batch, 1)):
        if not weights[i]:
            continue
        loss = loss_of(i, one) * float(weights[i])
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                squares[name][i] = squared_norm(gradient)
                sums[name] = gradient if name not in sums else sums[name].add_(gradient)
    if replicas is not None:
        # A parameter that only another replica's examples reach is in the sum, too.
        sums = {n: sums.get(n, torch.zeros_like(p)) for n, p in parameters.items()}
        replicas.sum_in_place(list(sums.values()))
    own = CalibrationSample(weights, squares, {n: squared_norm(total) for n, total in sums.items()})
    return own if replicas is None else replicas.gather_calibration(own)
