"""Run a model for a check, and leave it unchanged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random states afterwards, and run without the user's hooks.

    Sharded models keep their hooks, since these gather the weights.
    """
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    hooks = [] if sharded else [_take_hooks(module) for module in model.modules()]
    try:
        with keep_state(model):
            yield
    finally:
        for restore in hooks:
            restore()


@contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Give buffers and random states their values back afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with keep_buffers(model), torch.random.fork_rng(devices):
        yield


@contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Give buffers, such as running means, their values back afterwards, also where a pass puts new tensors there."""
    places = [(module._buffers, dict(module._buffers.items())) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for now, before in places:
            _put_back(now, before)


def _put_back(now: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> None:
    """Let a module's buffers be the tensors that they were; those that were not there go."""
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, buffer in before.items():
        if name not in now or now[name] is not buffer:
            now[name] = buffer


def _take_hooks(module: nn.Module) -> Callable[[], None]:
    """Remove a module's forward hooks and return a function that restores them."""
    taken = {name: getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    for name in taken:
        setattr(module, name, OrderedDict())

    def restore() -> None:
        for name, hooks in taken.items():
            setattr(module, name, hooks)

    return restore
