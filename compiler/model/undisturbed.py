"""Run a model for a look at it, and leave it as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give buffers and random number generators back as they were, and let no hook of the user's run.

    Sharded models keep their hooks: it is these that bring the weights.
    """
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    hooks = [] if sharded else [_take_hooks(module) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for put_back in hooks:
            put_back()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def _take_hooks(module: nn.Module) -> Callable[[], None]:
    """Take a module's forward hooks away and return what puts them back."""
    taken = {name: getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    for name in taken:
        setattr(module, name, OrderedDict())

    def put_back() -> None:
        for name, hooks in taken.items():
            setattr(module, name, hooks)

    return put_back
