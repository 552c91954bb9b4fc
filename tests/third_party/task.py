"""A small model and its data."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Part:
    """Examples that can be fetched by index."""

    def __init__(self, count: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, 6, generator=g)
        self.targets = self.inputs[:, :3].sin()

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, example axis first."""
        return self.inputs[list(indices)], self.targets[list(indices)]


def data() -> SimpleNamespace:
    """Return what trains and what is held out."""
    return SimpleNamespace(train=Part(64, 0), evaluation=Part(16, 1), tokens_per_sample=1)


def net() -> nn.Module:
    """Return the model, untrained."""
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
