"""Dropout with one mask for both views of an example, so that their distance measures the noise alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.layers.site_state import BoundLayer


class BoundDropout(BoundLayer):
    def forward(self, x: Tensor) -> Tensor:
        own = cast(nn.Dropout, self)
        if not self.reaches_operator() or own.p == 0.0:
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        half = x.shape[0] // self.trainc.views
        mask = nn.functional.dropout(torch.ones_like(x[:half]), own.p, training=True)
        return x * torch.cat([mask] * self.trainc.views)
