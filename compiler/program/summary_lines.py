"""Summary lines that belong to no action: losses and constant rate factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.runtime.step.record import Step


def loss_lines(
    method: LoweredMethod, first: Mapping[str, float], last: Step | None, steps: int
) -> Iterator[str]:
    """Yield the loss and its terms at the first and at the last step."""
    if last is None or "loss" not in first:
        return
    yield f"loss: {first['loss']:.4g} -> {last.loss:.4g} in {steps} steps"
    pairing = method.rewrite.pairing
    if pairing is not None:
        change = f"{first['consistency']:.4g} -> {last.metrics['consistency']:.4g}"
        sites = len(method.rewrite.noises)
        yield f"{pairing.label}: distance of the two views {change}, noise at {sites} layers"


def factor_lines(method: LoweredMethod) -> Iterator[str]:
    """Yield the factors of learning rate policies that never change, and so have no action."""
    with_action = {action.name for action in method.actions}
    factors: dict[str, list[float]] = {}
    for lr_factors in method.lr_factors.values():
        for lr_factor in lr_factors:
            if lr_factor.policy not in with_action:
                factors.setdefault(lr_factor.policy, []).append(lr_factor.factor)
    for policy, values in factors.items():
        yield f"{policy}: factors {min(values):.3g} to {max(values):.3g} on {len(values)} parameters"
