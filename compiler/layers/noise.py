"""Layers whose output is multiplied by noise."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.sites import NoiseSite
from trainc.kernels.noise.multiplicative_noise import multiplicative_noise


class BoundNoise(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        out = super().run_operator(x)
        state, site = self.trainc, cast(NoiseSite, self.trainc.noise)
        assert state.sigma is not None
        assert state.key is not None
        return multiplicative_noise(
            out, state.sigma, state.key, site.index, state.views, site.share, state.first_example
        )
