"""Unscale gradients that a GradScaler scaled, before anything reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainc.compiler.program.distributed import first_shard
from trainc.runtime.step.optimizer import OptimizerStep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from trainc.compiler.method.lowered_method import LoweredMethod


def unscale_gradients(
    scaler: torch.amp.GradScaler, method: LoweredMethod, parameters: Mapping[str, nn.Parameter]
) -> bool:
    """Divide gradients by what the losses were multiplied by, and return whether one of them overflowed.

    Raises ValueError with an update mask or with sharded parameters, where a GradScaler cannot do its work.
    """
    if method.selected_entries:
        names = ", ".join(f"`{name}`" for name in method.selected_entries)
        raise ValueError(
            f"a GradScaler cannot find the gradients of {names}, which a `mask` clause keeps elsewhere: train in"
            " bfloat16, which needs no scaler, or remove the mask"
        )
    if first_shard(parameters) is not None:
        raise ValueError(
            "with sharded parameters (FSDP2), replicas may disagree on whether a gradient overflowed: train in"
            " bfloat16, which needs no scaler"
        )
    for action in method.actions:
        if isinstance(action, OptimizerStep):
            scaler.unscale_(action.torch)
    found = [p.grad for p in parameters.values() if p.grad is not None]
    return not all(torch.stack([gradient.isfinite().all() for gradient in found]).tolist())
