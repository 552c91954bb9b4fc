"""Approximated prompt tuning: the effect of prompts on attention, token by token and without a longer sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.adapt._beside import Beside
from trainc.dsl.reading.construct import Effect, Problem

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets

_DEVIATION = 0.02


class Apt(Beside):
    """Changes the output x of selected modules to `exp(s) (x + g w (a T))` with trained prompts T; the rest is frozen.

    Of the module's first input u, `a = relu(u K^T)` weighs the prompts T (tokens, C) by the keys `K = T + (T A^T) B^T`
    with A (rank, C) and B (C, rank), and w is the largest weight of the token, through which no gradient flows. There
    is no softmax and no head, and the sequence is no longer than it was: 4 N tokens C operations for N tokens. The
    module is an attention, whose output is as wide as its input; of a tuple the first tensor is changed.

    The published start, T normal with deviation 0.02, A standard normal and B zero, has no g and changes the first
    output: w (a T) is not zero. `init = identity`, which is ours, has a trained gate g that starts at zero, so that the
    first output is the model's own, bit for bit; B starts with deviation 0.02 there, for all but g and s wait for the
    second step. The gradient of B is large, since w and a are not normalized: use a small rate, or clip. The
    parameters are `LAYER.apt.prompts`, `.a`, `.b`, `.log_scale` (s) and `.gate` (g). The released code of METER does
    not train s: `scale = one`. It cannot be merged. Noise of `regularize pace` on the module itself acts on g w (a T).
    """

    cite: ClassVar = "Wu et al., Approximated Prompt Tuning for Vision-Language Pre-trained Models, arXiv:2306.15706"
    usage: ClassVar = 'adapt apt on "blocks.*.attn" { tokens = 16, rank = 4 }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"tokens": "0"}
    functions: ClassVar = ("trainc.compiler.constructs.adapt.apt:approximated_prompts",)
    effects: ClassVar = (
        Effect("forward", "add what prompts give each token", ("params", "inputs"), ("forward",)),
    )

    tokens: int = Field(
        ge=0, description="prompts of each module; 0: no adapter, and nothing is frozen"
    )
    rank: int = Field(default=4, ge=1, description="rank of the change of the keys")
    scale: Literal["trained", "one"] = Field(
        default="trained", description="whether s trains, or is left out, as exp(s) = 1"
    )
    init: Literal["identity", "published"] = Field(
        default="identity",
        description="how it starts: as the model, by a gate that is zero, or as published, without a gate",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="probability that a weight of a is dropped in training"
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report modules that do not say how wide they are, and a rank that the keys cannot have."""
        yield from super().validate_targets(bound)
        if self.tokens and self.rank > self.tokens:
            yield Problem(
                "no-effect",
                f"the keys of {self.tokens} prompts have no change of a rank above {self.tokens}",
                field="rank",
                help=f"write `rank = {self.tokens}` or less",
                severity="warning",
            )

    def make_parts(self, inputs: int, outputs: int) -> dict[str, Any]:
        """Return the prompts, the map of the keys, scale and gate of one module."""
        import torch
        from torch import nn

        shapes: dict[str, tuple[int, ...]] = {
            "prompts": (self.tokens, inputs),
            "a": (self.rank, inputs),
            "b": (inputs, self.rank),
        }
        shapes |= {"log_scale": (1,)} if self.scale == "trained" else {}
        shapes |= {"gate": (1,)} if self.init == "identity" else {}
        made: dict[str, Any] = {n: nn.Parameter(torch.empty(s)) for n, s in shapes.items()}
        return made | ({"dropout": nn.Dropout(self.dropout)} if self.dropout else {})

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Draw the prompts and A, and B where there is a gate; the others start at zero."""
        from torch import nn

        if name == "a":
            nn.init.normal_(tensor, generator=generator)
        elif name == "prompts" or (name == "b" and self.init == "identity"):
            nn.init.normal_(tensor, std=_DEVIATION, generator=generator)
        else:
            nn.init.zeros_(tensor)

    def channels(self, adapter: Any) -> int:
        """Return how many channels an adapter takes."""
        width: int = adapter.prompts.shape[1]
        return width

    def added(self, adapter: Any, x: Tensor) -> Tensor:
        """Return g w (a T) of the module's input (..., C)."""
        weigh = adapter.dropout if self.dropout else None
        prompts = adapter.prompts
        change = _change(x.to(prompts.dtype), prompts, adapter.a, adapter.b, weigh)
        return change * adapter.gate if self.init == "identity" else change

    def combined(self, adapter: Any, y: Tensor, dy: Tensor) -> Tensor:
        """Return `exp(s) (y + dy)`."""
        found = y + dy
        return found * adapter.log_scale.exp() if self.scale == "trained" else found

    def reference(self, output: Tensor, inputs: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Return the adapted output by definition, token by token: output and inputs (N, C), parameters by name."""
        import torch

        prompts, a, b = (parts[name] for name in ("prompts", "a", "b"))
        keys = [t + sum(b[:, h] * (a[h] @ t) for h in range(len(a))) for t in prompts]
        rows = []
        for x, u in zip(output, inputs, strict=True):
            weights = [(u @ key).clamp(min=0) for key in keys]
            mixed = sum(weight * t for weight, t in zip(weights, prompts, strict=True))
            change = max(float(weight) for weight in weights) * mixed
            found = x + parts.get("gate", torch.ones(())) * change
            rows.append(found * parts.get("log_scale", torch.zeros(())).exp())
        return torch.stack(rows)


def approximated_prompts(
    output: Tensor,
    inputs: Tensor,
    prompts: Tensor,
    a: Tensor,
    b: Tensor,
    log_scale: Tensor | float = 0.0,
    gate: Tensor | float = 1.0,
) -> Tensor:
    """Return the output of a module with approximated prompts, `exp(log_scale) (output + gate w (A T))`.

    `output` (..., C) is what the module gave, `inputs` (..., C) what it was given, `prompts` T are (r, C), and `a`
    (h, C) and `b` (C, h) change the keys `T + (T a^T) b^T`. A = relu(inputs keys^T) weighs the prompts, and w is the
    largest weight of a token, without gradient. `log_scale` is 0-d or a number, and `gate` 1 the published form.

    Raises ValueError for shapes that do not fit each other. Source: Wu et al., arXiv:2306.15706.
    """
    import torch

    width = prompts.shape[-1]
    fits = prompts.dim() == 2 and a.shape == (len(a), width) and b.shape == (width, len(a))
    if not fits or output.shape != inputs.shape or output.shape[-1] != width or not len(prompts):
        raise ValueError(
            "expected `output` and `inputs` (..., C), `prompts` (r, C) with r of 1 or more, `a` (h, C) and `b` (C, h),"
            f" found {tuple(output.shape)}, {tuple(inputs.shape)}, {tuple(prompts.shape)}, {tuple(a.shape)} and"
            f" {tuple(b.shape)}"
        )
    scale = torch.as_tensor(log_scale, dtype=output.dtype, device=output.device).exp()
    return scale * (output + gate * _change(inputs, prompts, a, b, None))


def _change(
    inputs: Tensor, prompts: Tensor, a: Tensor, b: Tensor, weigh: nn.Module | None
) -> Tensor:
    """Return w (A T); `weigh` is the dropout of the weights A, where there is one."""
    keys = prompts + (prompts @ a.T) @ b.T
    weights = (inputs @ keys.T).relu()
    largest = weights.detach().amax(-1, keepdim=True)
    return largest * ((weights if weigh is None else weigh(weights)) @ prompts)
