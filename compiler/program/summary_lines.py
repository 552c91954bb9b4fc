"""What of a run's outcome no action tells: the loss with its terms, and the factors of rates that never change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainc.compiler.method.lowered_method import LoweredMethod
    from trainc.runtime.step.record import Step


def loss_lines(
    parts: LoweredMethod, first: Mapping[str, float], last: Step | None, steps: int
) -> Iterator[str]:
    """Yield what the loss and its terms were at first and at last."""
    if last is None or "loss" not in first:
        return
    yield f"loss: {first['loss']:.4g} -> {last.loss:.4g} in {steps} steps"
    pairing = parts.rewrite.pairing
    if pairing is not None:
        apart = f"{first['consistency']:.4g} -> {last.metrics['consistency']:.4g}"
        sites = len(parts.rewrite.noises)
        yield f"{pairing.label}: distance of the two views {apart}, noise at {sites} layers"


def factor_lines(parts: LoweredMethod) -> Iterator[str]:
    """Yield the factors of rate policies that never change and so have no action to tell of them."""
    told = {action.name for action in parts.actions}
    factors: dict[str, list[float]] = {}
    for lr_factors in parts.lr_factors.values():
        for lr_factor in lr_factors:
            if lr_factor.policy not in told:
                factors.setdefault(lr_factor.policy, []).append(lr_factor.factor)
    for policy, found in factors.items():
        yield f"{policy}: factors {min(found):.3g} to {max(found):.3g} on {len(found)} parameters"
