"""Layers that draw random numbers: noise on their output, and dropout with one mask for both views of an example."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.sites import NoiseSite
from trainc.kernels.noise.multiplicative_noise import multiplicative_noise


class BoundNoise(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        out = super().run_operator(x)
        state, site = self.trainc, cast(NoiseSite, self.trainc.noise)
        if state.sigma is None:
            return out
        assert state.key is not None
        return multiplicative_noise(
            out, state.sigma, state.key, site.index, state.views, site.share, state.first_example
        )


class BoundDropout(BoundLayer):
    """Dropout with a shared mask, so that the distance between the views measures the noise alone."""

    def reaches_operator(self) -> bool:
        """Say whether the views share a mask now: without dropout there is none, and one view needs no sharing."""
        shared = self.trainc.views > 1 and cast(nn.Dropout, self).p != 0.0
        return super().reaches_operator() and shared

    def run_operator(self, x: Tensor) -> Tensor:
        own = cast(nn.Dropout, self)
        half = x.shape[0] // self.trainc.views
        mask = nn.functional.dropout(torch.ones_like(x[:half]), own.p, training=True)
        return x * torch.cat([mask] * self.trainc.views)
