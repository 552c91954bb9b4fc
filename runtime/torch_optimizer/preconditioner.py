"""What Adam divides updates by, from its second moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def second_moment_scale(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor | None:
    """Return 1 / (sqrt(v_hat) + eps) of a parameter; None before its first step, and for what is not Adam.

    `options` are those of its group, `state` is its own.
    """
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.NAdam)
    if not known or not (steps := float(state.get("step", 0.0))):
        return None
    largest: Tensor = state["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"]
    beta = options["betas"][1]
    scale: Tensor = 1 / ((largest / (1 - beta**steps)).sqrt() + options["eps"])
    return scale
