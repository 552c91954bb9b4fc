"""Optimizers with a mode for training and one for evaluation, which has other weights, such as an average of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from trainc.runtime.processes.sharded import is_sharded

Weights = list[tuple[Tensor, Tensor]]
"""Parameters, each with the memory, or of sharded ones a copy, that holds its weights."""


class HasModes(torch.optim.Optimizer):
    """An optimizer whose `eval()` puts the weights for evaluation into the parameters, and `train()` takes them out."""

    def train(self) -> Any: ...

    def eval(self) -> Any: ...


def has_modes(optimizer: object) -> TypeGuard[HasModes]:
    """Say whether an optimizer, or a class of optimizers, has `train()` and `eval()`."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@torch.no_grad()
def weights_now(tensors: Sequence[Tensor]) -> Weights:
    """Return what parameters hold now; `put` gives it back bit for bit, which `train()` after `eval()` may not."""
    return [(t, t.detach().clone() if is_sharded(t) else t.data) for t in tensors]


@torch.no_grad()
def put(weights: Weights) -> None:
    """Give parameters their weights; nothing that autocast has rounded before counts any longer."""
    torch.clear_autocast_cache()
    for tensor, value in weights:
        if is_sharded(tensor):
            tensor.copy_(value)
        else:
            tensor.data = value


@torch.no_grad()
def put_copies(weights: Weights) -> None:
    """Give parameters copies of their weights, which an optimizer may overwrite."""
    put([(tensor, value.clone()) for tensor, value in weights])
