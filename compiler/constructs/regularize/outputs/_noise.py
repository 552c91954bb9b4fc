"""Multiplicative noise on the output of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trainc.compiler.method.layer_hook import LayerContext, LayerHook

if TYPE_CHECKING:
    from torch import Tensor

Share = Literal["token", "none", "none_fast"]
"""Which tokens of an example have one noise: all, or none; fast, by a device's approximate functions."""


@dataclass(frozen=True)
class Noise(LayerHook):
    """Multiplies the output by `1 + sigma * normal`, drawn per (view, example, channel); `sigma` is its scalar."""

    operator: ClassVar = "multiplicative_noise"
    fused_by: ClassVar = "add_noise"
    zero_is_identity: ClassVar = True

    share: Share = "token"

    @property
    def algorithm(self) -> str:
        """Where the noise is approximate."""
        fast = "none_fast by the Triton kernel, none elsewhere"
        return fast if self.share == "none_fast" else ""

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Return the noisy output."""
        from trainc.kernels.noise import multiplicative_noise as noise

        at.check_examples(y, "Noise by example")
        apply = noise.composed_noise if at.captured else noise.multiplicative_noise
        sigma, first = at.scalars["sigma"], at.first_example
        return apply(y, sigma, at.key, at.index, at.views, self.share, first)
