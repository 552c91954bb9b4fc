"""SGD: stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.optimizer._base import (
    Implementation,
    Optimizer,
    implementation_flags,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SGD(Optimizer):
    """Steps against the gradient, with heavy-ball or Nesterov momentum; weight decay is added to the gradient.

    `g = g + decay w; b = momentum b + g; w = w - lr b`: as in torch, the rate is not part of the momentum buffer b.
    """

    cite: ClassVar = "Sutskever et al., On the importance of initialization and momentum, ICML 2013"
    usage: ClassVar = "optimizer sgd { lr = 0.1, momentum = 0.9, weight_decay = 5e-4 }"
    decay_form: ClassVar = "coupled"

    momentum: float = Field(
        default=0.0, ge=0, description="factor of the previous momentum buffer, in [0, 1)", lt=1
    )
    nesterov: bool = Field(
        default=False,
        description="use Nesterov momentum: step along g + momentum b",
    )
    implementation: Implementation = "auto"
    follows_gradient: ClassVar = True

    def update_norm(self, out: float, into: float) -> float:
        """Return that of a gradient, which grows with sqrt(fan-in / fan-out)."""
        return float((into / out) ** 0.5)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("`nesterov = true` needs a `momentum` above 0")
        return self

    @property
    def averages_gradients(self) -> bool:
        """Whether there is momentum."""
        return self.momentum != 0

    @property
    def moments(self) -> float:
        """Return 1 with momentum, whose buffer it is."""
        return 1 if self.momentum else 0

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            groups,
            lr=1.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            **implementation_flags(self.implementation),
        )

    def reference(
        self, w: Tensor, gradients: list[Tensor], lr: float, weight_decay: float = 0.0
    ) -> Tensor:
        """Return `w` after one update per gradient, by definition; all of one shape."""
        buffer = None
        for gradient in gradients:
            g = gradient + weight_decay * w
            buffer = g if buffer is None else self.momentum * buffer + g
            w = w - lr * (g + self.momentum * buffer if self.nesterov else buffer)
        return w
