"""Parallel adapter: a trained bottleneck beside each selected module, which stays frozen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.adapt._beside import Beside
from trainc.dsl.reading.construct import Effect

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

_PUBLISHED = "xavier"


class Parallel(Beside):
    """Trains `scale * (W2 act(W1 norm(u) + b1) + b2)` beside each selected module of the input u; the rest is frozen.

    The module is a block, an attention, an MLP, also as an nn.Sequential, or a linear layer, and its output y, or the
    first tensor of a tuple, becomes the sum of the two. W1 is (rank, in), W2 is (out, rank). A module around several
    layers gives as many channels as it takes. W2 and both biases start at zero, so that the first output is the model's
    own, bit for bit, while W2 has a gradient in the first step and W1 in the second. `init = xavier` draws both, as in
    the released code of Forecast-PEFT, and changes the first output. A whole block of a pre-norm model takes an input
    without norm: there `norm = layer` gives the adapter one of its own.

    The parameters are `LAYER.parallel.down.weight`, `LAYER.parallel.up.weight` and their biases. What it computes is
    not linear, so that it cannot be merged. Initial values depend on the run's seed and the parameter's name alone.
    Noise of `regularize pace` on an adapted module acts on what the adapter adds.
    """

    cite: ClassVar = (
        "He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022, arXiv:2110.04366; "
        "Wang et al., Forecast-PEFT, arXiv:2407.19564"
    )
    usage: ClassVar = 'adapt parallel on "blocks.*.attn" | "blocks.*.mlp" { rank = 8 }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"scale": "0"}
    effects: ClassVar = (
        Effect("forward", "add outputs of bottlenecks", ("params", "inputs"), ("forward",)),
    )

    rank: int = Field(default=64, ge=1, description="width of the bottleneck")
    act: Literal["gelu", "relu", "silu"] = Field(
        default="gelu", description="activation of the bottleneck"
    )
    scale: float = Field(
        default=1.0,
        ge=0,
        description="factor on what is added; 0: no adapter, and nothing is frozen",
    )
    norm: Literal["none", "layer"] = Field(
        default="none",
        description="whether the adapter has a LayerNorm of its own in front, which trains",
    )
    init: Literal["up_zero", "xavier"] = Field(
        default="up_zero",
        description="how it starts: W2 zero and W1 uniform in +-1/sqrt(in), or both uniform in +-sqrt(6/(in + out))",
    )
    drop_path: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that an example goes without the adapter in training; others have it times 1/(1 - p)",
    )

    def make_parts(self, inputs: int, outputs: int) -> dict[str, nn.Module]:
        """Return the two layers of one adapter, and its norm."""
        from torch import nn

        made: dict[str, nn.Module] = {"norm": nn.LayerNorm(inputs)} if self.norm == "layer" else {}
        made |= {"down": nn.Linear(inputs, self.rank), "up": nn.Linear(self.rank, outputs)}
        return made | ({"dropout": nn.Dropout(self.drop_path)} if self.drop_path else {})

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Set the biases to zero, and W2 where it starts there; the norm starts as 1 and 0."""
        from torch import nn

        if name == "norm.weight":
            nn.init.ones_(tensor)
        elif name.endswith("bias"):
            nn.init.zeros_(tensor)
        elif self.init == _PUBLISHED:
            nn.init.xavier_uniform_(tensor, generator=generator)
        elif name == "up.weight":
            nn.init.zeros_(tensor)
        else:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    def channels(self, adapter: Any) -> int:
        """Return how many channels an adapter takes."""
        width: int = adapter.down.in_features
        return width

    def added(self, adapter: Any, x: Tensor) -> Tensor:
        """Return `scale * (W2 act(W1 norm(x) + b1) + b2)`; an example that its drop path leaves out has 0."""
        from torch.nn import functional as F

        x = x.to(adapter.down.weight.dtype)
        if self.norm == "layer":
            x = adapter.norm(x)
        y: Tensor = adapter.up(getattr(F, self.act)(adapter.down(x))) * self.scale
        if self.drop_path:
            y = y * adapter.dropout(y.new_ones((len(y), *[1] * (y.dim() - 1))))
        return y

    def reference(self, x: Tensor, own: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Return the adapted output by definition, in evaluation: input x (rows, in), the module's `own` (rows, out).

        `parts` are the adapter's parameters by name.
        """
        import torch

        rows = []
        for u, y in zip(x, own, strict=True):
            if self.norm == "layer":
                mean = u.mean()
                deviation = ((u - mean).square().mean() + 1e-5).sqrt()
                u = (u - mean) / deviation * parts["norm.weight"] + parts["norm.bias"]
            added = parts["up.bias"].clone()
            for r in range(self.rank):
                h = parts["down.bias"][r] + sum(
                    w * v for w, v in zip(parts["down.weight"][r], u, strict=True)
                )
                added = added + parts["up.weight"][:, r] * _activated(h, self.act)
            rows.append(y + self.scale * added)
        return torch.stack(rows)


def _activated(h: Tensor, act: str) -> Tensor:
    """Return the activation of one number by its formula."""
    import torch

    if act == "relu":
        return h if float(h) > 0 else torch.zeros_like(h)
    return h / (1 + (-h).exp()) if act == "silu" else h * (1 + (h / math.sqrt(2)).erf()) / 2
