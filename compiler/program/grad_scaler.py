"""Unscale: what a GradScaler has to do between the backward passes and what reads their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainc.compiler.program.distributed import first_shard
from trainc.runtime.step.optimizer import OptimizerStep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from trainc.compiler.method.lowered_method import LoweredMethod


def unscale(
    scaler: torch.amp.GradScaler, parts: LoweredMethod, parameters: Mapping[str, nn.Parameter]
) -> bool:
    """Divide gradients by what the losses were multiplied by, and return whether one of them overflowed."""
    if parts.selected_entries:
        names = ", ".join(f"`{name}`" for name in parts.selected_entries)
        raise ValueError(
            f"a mask keeps the gradients of {names} where no GradScaler finds them: train in bfloat16, which needs no"
            " scaler, or leave the mask out"
        )
    if first_shard(parameters) is not None:
        raise ValueError(
            "replicas of sharded parameters (FSDP2) do not agree on what overflowed: train in bfloat16, which needs no"
            " scaler"
        )
    for action in parts.actions:
        if isinstance(action, OptimizerStep):
            scaler.unscale_(action.torch)
    found = [p.grad for p in parameters.values() if p.grad is not None]
    return not all(torch.stack([gradient.isfinite().all() for gradient in found]).tolist())
