"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.optimizer._base import (
    Implementation,
    Optimizer,
    implementation_flags,
)
from trainc.dsl.reading.construct import ScopedDecayRates
from trainc.dsl.values.value_json import Items, Number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from trainc.runtime.step.entry_updates import Chosen


class AdamW(Optimizer):
    """Adam with weight decay that multiplies the weights by `1 - lr * decay` and is not part of the moments.

    `m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w = w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)`.
    """

    cite: ClassVar = (
        "Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv:1711.05101"
    )
    usage: ClassVar = (
        "optimizer adamw {"
        " lr = 3e-4 * (warmup(5%) then cosine(to = 10%)), weight_decay = 0.1 on matrices }"
    )
    decay_form: ClassVar = "decoupled"

    scheduled: ClassVar = ("betas",)

    betas: ScopedDecayRates = Field(
        default=Items((Number(0.9), Number(0.999))),
        description="decay rates of the two moments, in [0, 1): numbers or expressions, for all parameters or by"
        " selector. The bias correction is that of the betas of the step, as in torch",
    )
    eps: float = Field(
        default=1e-8, gt=0, description="added to the square root of the second moment"
    )
    implementation: Implementation = "auto"

    def update_norm(self, out: float, into: float) -> float:
        """Return that of a matrix of ones: the entries of an update are near 1 and -1, and of low rank."""
        return float((out * into) ** 0.5)

    @property
    def averages_gradients(self) -> bool:
        """True: the first moment."""
        return True

    @property
    def moments(self) -> float:
        """Return 2: the averages of gradients and of their squares."""
        return 2

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            groups,
            lr=1.0,
            eps=self.eps,
            **implementation_flags(self.implementation),
        )

    @property
    def steps_entries(self) -> bool:
        """True, unless the spec says which of torch's implementations runs."""
        return self.implementation == "auto"

    def update_entries(self, options: Mapping[str, Any], entries: Sequence[Chosen]) -> None:
        """Step all that have taken as many steps by one call; the state is that of torch.optim.AdamW."""
        import torch

        from trainc.kernels.parameter.sparse_adamw import sparse_adamw_

        wide = torch.get_default_dtype() == torch.float64
        together: dict[tuple[Any, ...], list[Chosen]] = {}
        for one in entries:
            if not one.state:
                first = torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32)
                moments = torch.zeros_like(one.grad), torch.zeros_like(one.grad)
                one.state.update(
                    zip(("step", "exp_avg", "exp_avg_sq"), (first, *moments), strict=True)
                )
            one.state["step"] += 1
            key = one.weight.device, float(one.state["step"]), one.master is None
            together.setdefault(key, []).append(one)
        beta1, beta2 = options["betas"]
        for group in together.values():
            sparse_adamw_(
                [one.weight for one in group],
                [one.grad for one in group],
                [one.state["exp_avg"] for one in group],
                [one.state["exp_avg_sq"] for one in group],
                [one.index for one in group],
                lr=options["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=options["eps"],
                weight_decay=options["weight_decay"],
                step=group[0].state["step"],
                gathered=True,
                master=[one.master for one in group if one.master is not None] or None,
            )

    def reference(
        self,
        w: Tensor,
        gradients: list[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Tensor:
        """Return `w` after one update per gradient, by definition; all of one shape."""
        b1, b2 = betas
        m, v = w.new_zeros(w.shape), w.new_zeros(w.shape)
        for t, g in enumerate(gradients, start=1):
            w = w * (1 - lr * weight_decay)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            w = w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return w
