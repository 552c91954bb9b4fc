"""Dropout with one mask for both views of an example, so that their distance measures the noise alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.layers.site_state import BoundLayer


class BoundDropout(BoundLayer):
    def reaches_operator(self) -> bool:
        """Say whether the views share a mask now: without dropout there is none."""
        return super().reaches_operator() and cast(nn.Dropout, self).p != 0.0

    def run_operator(self, x: Tensor) -> Tensor:
        own = cast(nn.Dropout, self)
        half = x.shape[0] // self.trainc.views
        mask = nn.functional.dropout(torch.ones_like(x[:half]), own.p, training=True)
        return x * torch.cat([mask] * self.trainc.views)
