"""Loops written by hand for methods that run the passes of a step at other weights, and the clauses they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Passes = Callable[[], float]
"""Accumulates the gradient of a whole step, and returns its loss."""
Tensors = dict[str, Tensor]

RHO, ALPHA = 0.5, 0.7
CLAUSES = {
    "sam": f"perturb sam {{ rho = {RHO} }}",
    "asam": f"perturb sam {{ rho = {RHO}, adaptive = true, eta = 0.1 }}",
    "msam": f"perturb msam {{ rho = {RHO} }}",
    "gradient_norm": f"perturb gradient_norm {{ radius = {RHO}, alpha = {ALPHA} }}",
    "extrapolate": f"perturb extrapolate {{ direction = past_gradient, rate = {RHO},"
    " look_ahead = 0.9 * lr, scope = all }",
    "looksam": f"perturb looksam {{ rho = {RHO}, alpha = {ALPHA}, refresh = 3 steps }}",
}


def norm(tensors: Tensors) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(
        torch.cat([one.flatten() for one in tensors.values()])
    )
    return length


class Loop:
    """Steps of one method on one model by hand, with the optimizer's own state."""

    def __init__(
        self, method: str, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None
    ) -> None:
        self.method, self.model, self.optimizer, self.clip = method, model, optimizer, clip
        self.named = dict(model.named_parameters())
        self.steps = 0
        self.kept: Tensors = {}

    def gradients(self, passes: Passes) -> tuple[float, Tensors]:
        self.optimizer.zero_grad()
        loss = passes()
        found = {n: p.grad.clone() for n, p in self.named.items() if p.grad is not None}
        return loss, found

    @torch.no_grad()
    def moved(self, passes: Passes, moves: Tensors) -> tuple[float, Tensors]:
        """Return loss and gradients where the weights are moved to."""
        before = {name: p.detach().clone() for name, p in self.named.items()}
        for name, move in moves.items():
            self.named[name].add_(move)
        with torch.enable_grad():
            found = self.gradients(passes)
        for name, p in self.named.items():
            p.copy_(before[name])
        return found

    def wanted(self, passes: Passes) -> tuple[float, Tensors]:
        """Return the loss that a step reports, and the gradient it updates with."""
        state: Any = self.optimizer.state
        keys = ("momentum_buffer", "exp_avg")
        means = {n: state[p].get(k) for n, p in self.named.items() for k in keys if k in state[p]}
        if self.method == "extrapolate":
            ahead = 0.9 * self.optimizer.param_groups[0]["lr"]
            moves = {n: -RHO * g - ahead * means[n] for n, g in self.kept.items()}
            loss, self.kept = self.moved(passes, moves)
            return loss, {n: g.clone() for n, g in self.kept.items()}
        if self.method == "msam":
            return self.moved(passes, {n: -RHO * v / norm(means) for n, v in means.items()})
        loss, first = self.gradients(passes)
        if self.method == "looksam" and self.steps % 3:
            factor = ALPHA * norm(first) / norm(self.kept)
            return loss, {n: g + factor * self.kept[n] for n, g in first.items()}
        if self.method == "asam":
            scale = {n: self.named[n].detach().abs() + 0.1 for n in first}
            length = norm({n: scale[n] * g for n, g in first.items()})
            moves = {n: RHO * scale[n] ** 2 * g / length for n, g in first.items()}
        else:
            moves = {n: RHO * g / norm(first) for n, g in first.items()}
        loss, second = self.moved(passes, moves)
        if self.method == "gradient_norm":
            return loss, {n: (1 - ALPHA) * first[n] + ALPHA * g for n, g in second.items()}
        if self.method == "looksam":
            part = sum((first[n] * g).sum() for n, g in second.items()) / norm(first) ** 2
            self.kept = {n: g - part * first[n] for n, g in second.items()}
        return loss, second

    def step(self, passes: Passes) -> float:
        loss, found = self.wanted(passes)
        for name, gradient in found.items():
            self.named[name].grad = gradient
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss
