"""NEFTune: uniform noise on the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering

MASK = "attention_mask"
"""The input of a model that is 0 at padding, by the name that transformers gives it."""


class Neftune(Construct):
    """Adds `U(-1, 1) * alpha / sqrt(L d)` to the embeddings of each example, with L its tokens and d their width.

    L counts the tokens that are no padding, so that the noise of an example does not depend on what it
    is batched with: an input named `attention_mask` tells them, or the id `padding`, which is that of
    the embedding unless given (`padding_idx`). Of a row packed from several documents give the
    `separator` that ends each: L is then the length of a token's own document. All tokens and channels
    have numbers of their own, drawn for each step and example. Evaluation has no noise. Where a
    regularizer lets the views of an example share dropout masks, they share the noise.
    """

    cite: ClassVar = (
        "Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, ICLR 2024, "
        "arXiv:2310.05914, algorithm 1"
    )
    usage: ClassVar = 'regularize neftune on "embed.token" { alpha = 5 }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"alpha": "0"}
    effects: ClassVar = (
        Effect("forward", "add noise to embeddings", ("inputs", "clock"), ("forward",)),
    )

    alpha: Schedule = Field(description="size of the noise; 5 to 15 as published")
    mask: str | None = Field(
        default=None,
        description=f"name of the model's input that is 0 at padding; `{MASK}` where there is one of this name",
    )
    padding: int | None = Field(
        default=None,
        ge=0,
        description="id of the token that is padding; the embedding's own unless given",
    )
    separator: int | None = Field(
        default=None,
        ge=0,
        description="id of the token that ends a document, in rows of several documents",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report modules that are no embeddings of tokens."""
        for module in bound.modules:
            if "Embedding" not in module.types:
                yield Problem(
                    "wrong-target-kind",
                    f"`{module.name}` is a {module.types[0]}; the noise is for embeddings of tokens",
                    help="select the embedding of the tokens: `& type(Embedding)`",
                )
                return

    def lower(self, to: Lowering) -> None:
        """Add noise to what each embedding gives."""
        for module in to.modules():
            padding = self.padding
            if padding is None:
                padding = getattr(to.model.get_submodule(module.name), "padding_idx", None)
            hook = EmbeddingNoise(self.mask, padding, self.separator)
            to.layer(module.name, hook, {"alpha": to.schedule(self.alpha)})

    @staticmethod
    def reference(embedding: Tensor, unit: Tensor, lengths: Tensor, alpha: float) -> Tensor:
        """Return noisy embeddings (B, T, d): `unit` is in [-1, 1], `lengths` are (B,), or (B, T) by token."""
        size = alpha / (lengths * embedding.shape[-1]) ** 0.5
        return embedding + unit * size.view(*size.shape, *[1] * (3 - size.dim()))


@dataclass(frozen=True)
class EmbeddingNoise(LayerHook):
    """Adds uniform noise to the embeddings of tokens; `alpha` is its scalar."""

    zero_is_identity: ClassVar = True

    mask: str | None
    padding: int | None
    separator: int | None

    def change_output_of(self, x: Any, y: Tensor, at: LayerContext) -> Tensor:
        """Return the noisy embeddings (B, T, d) of ids (B, T)."""
        from trainc.kernels.noise.uniforms import uniform

        at.check_examples(y, "Noise by example")
        if y.dim() != 3:
            raise at.error(
                f"`{at.name}` gives embeddings of shape {tuple(y.shape)}, and the noise needs (examples, tokens,"
                " width): exclude the layer from `on`"
            )
        alpha = at.scalars["alpha"]
        size = alpha / (self._lengths(x, at) * y.shape[-1]).to(alpha.dtype).sqrt()
        unit = 2 * at.draw(uniform, y, "none") - 1
        z = y + unit * size.unsqueeze(-1)
        return z if z.dtype == y.dtype else z.to(y.dtype)

    def _lengths(self, ids: Tensor, at: LayerContext) -> Tensor:
        """Return how many tokens the document of each token has, (B, T), or the row of each example, (B, 1)."""
        import torch

        counted = self._counted(ids, at)
        if self.separator is None:
            return counted.sum(1, keepdim=True).clamp(min=1)
        ends = (ids == self.separator).long()
        document = ends.cumsum(1) - ends  # the separator is the last token of its document
        tokens = torch.zeros_like(document).scatter_add(1, document, counted)
        return tokens.gather(1, document).clamp(min=1)

    def _counted(self, ids: Tensor, at: LayerContext) -> Tensor:
        """Return 1 for each token that is no padding, and 0 for the others, int64 (B, T)."""
        import torch

        named = at.inputs if isinstance(at.inputs, Mapping) else {}
        if self.mask is not None and self.mask not in named:
            have = (
                f"those are {', '.join(f'`{n}`' for n in named)}"
                if named
                else "these have no names"
            )
            raise at.error(
                f"`mask = {self.mask}` is none of the model's inputs: {have}. Give the id of the padding instead, as in"
                " `padding = 0`",
                "mask",
            )
        counted = torch.ones_like(ids, dtype=torch.int64)
        if (mask := named.get(self.mask or MASK)) is not None:
            mask = torch.cat([mask] * at.views) if at.views > 1 else mask
            if mask.shape != ids.shape:
                raise at.error(
                    f"the input `{self.mask or MASK}` has shape {tuple(mask.shape)}, and the ids of `{at.name}` have"
                    f" {tuple(ids.shape)}: a mask of another shape does not tell how long an example is. Name one that"
                    " does by `mask`, or give the id of the padding by `padding`",
                    "mask",
                )
            counted = (mask != 0).long()
        return counted if self.padding is None else counted * (ids != self.padding)
