"""Run a model for a check, and leave it unchanged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainc.compiler.model.adapters import AdapterHook
from trainc.runtime.storage.random_streams import global_states, set_global_states


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore what `keep_state` does afterwards, and run without the user's hooks.

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
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in train or eval mode, and each back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, own in modes:
            module.training = own


def gradients_of(
    total: Tensor, tensors: Sequence[Tensor], parameters: Iterable[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of a loss, and leave `.grad` as it is.

    A function with a backward pass inside its own, as reversible layers have one, adds to `.grad` instead of giving
    gradients on: what it adds there is counted, and taken away again. So do sharded parameters, whose gradients are
    averaged over processes in a whole backward pass alone.
    """
    kept = [(leaf, leaf.grad) for leaf in parameters]
    leaves = {id(one): one for one in (*tensors, *(leaf for leaf, _ in kept)) if one.is_leaf}
    for leaf in leaves.values():
        leaf.grad = None
    try:
        found: Sequence[Tensor | None] = [None] * len(tensors)
        if any(hasattr(leaf, "device_mesh") for leaf, _ in kept):
            total.backward()
        else:
            found = torch.autograd.grad(total, tensors, allow_unused=True)
        added = [leaves[id(one)].grad if id(one) in leaves else None for one in tensors]
    finally:
        for leaf, gradient in kept:
            leaf.grad = gradient
    return [
        more if gradient is None else gradient if more is None else gradient + more
        for gradient, more in zip(found, added, strict=True)
    ]


@contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Give buffers and random states their values back afterwards, those of the model's own generators too."""
    restore = random_states(model)
    try:
        with keep_buffers(model):
            yield
    finally:
        restore()


def random_states(model: nn.Module) -> Callable[[], None]:
    """Return what gives random states the values of now back, those of the model's own generators too."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    on_host, on_cuda = global_states(), [torch.cuda.get_rng_state(i) for i in devices]
    on_mps = torch.mps.get_rng_state() if any(p.is_mps for p in model.parameters()) else None
    own = [(generator, generator.get_state()) for generator in own_generators(model)]

    def restore() -> None:
        set_global_states(on_host)
        for index, state in zip(devices, on_cuda, strict=True):
            torch.cuda.set_rng_state(state, index)
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)
        for generator, state in own:
            generator.set_state(state)

    return restore


def own_generators(model: nn.Module) -> list[torch.Generator]:
    """Return the random generators that are attributes of modules, or stand in a list, tuple or dict that is one."""
    found: dict[int, torch.Generator] = {}
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value
            for one in held if isinstance(value, dict | list | tuple) else [value]:
                if isinstance(one, torch.Generator):
                    found[id(one)] = one
    return [*found.values()]


def set_own_generators(model: nn.Module, states: Sequence[Tensor]) -> None:
    """Give the generators that `own_generators` finds their states; raises ValueError for another number of them."""
    found = own_generators(model)
    if len(found) != len(states):
        raise ValueError(
            f"the model has {len(found)} random generators of its own, but the checkpoint has {len(states)}"
        )
    for generator, state in zip(found, states, strict=True):
        generator.set_state(state)


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


class ChangingBuffers:
    """Keeps buffers that passes change, such as running means, to give them their values of before a step back.

    The first step keeps all of them, the next ones only those that have changed: constant buffers cost nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[tuple[dict[str, Tensor | None], str]] | None = None
        self._kept: list[Tensor | None] = []
        self._versions: list[tuple[int, int]] = []
        self._changing: set[int] = set()
        self._settled = self._restored = False
        """Whether a step has shown which buffers change, and whether the last one was undone."""

    @classmethod
    def two(cls, model: nn.Module) -> tuple[ChangingBuffers, ChangingBuffers]:
        """Return two of one model, which keep values of different times."""
        return cls(model), cls(model)

    def keep(self) -> None:
        """Keep the values of now."""
        if self._places is None:
            self._places = self._find()
            self._kept = [None] * len(self._places)
        if not self._places:
            return
        now = [place.get(name) for place, name in self._places]
        versions = [_version(buffer) for buffer in now]
        if self._versions:
            pairs = zip(versions, self._versions, strict=True)
            self._changing.update(i for i, (new, old) in enumerate(pairs) if new != old)
            if not self._settled and not self._restored:
                pairs_of_values = zip(now, self._kept, strict=True)
                self._changing.update(
                    i for i, (new, old) in enumerate(pairs_of_values) if _differs(new, old)
                )
                self._settled = True
        self._versions, self._restored = versions, False
        for i, buffer in enumerate(now):
            wanted = not self._settled or i in self._changing
            if wanted and buffer is not None and not is_lazy(buffer):
                self._kept[i] = buffer.detach().clone()
            else:
                self._kept[i] = None

    def _find(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """Return the places of all buffers; torch counts no changes of running statistics, so these always change."""
        places: list[tuple[dict[str, Tensor | None], str]] = []
        for module in self._model.modules():
            for name in module._buffers:
                if name.startswith("running_"):
                    self._changing.add(len(places))
                places.append((module._buffers, name))
        return places

    def restore(self) -> None:
        """Give the buffers the values back that `keep` kept last; nothing happens before its first call."""
        self._restored = True
        with torch.no_grad():
            for (place, name), kept in zip(self._places or (), self._kept, strict=True):
                buffer = place.get(name)
                if kept is None or buffer is None:
                    continue
                if buffer.shape == kept.shape and not buffer.is_inference():
                    buffer.copy_(kept)
                else:
                    place[name] = kept.clone()
        self._versions = [_version(place.get(name)) for place, name in self._places or ()]


def _differs(now: Tensor | None, before: Tensor | None) -> bool:
    """Return whether a buffer has other values than it had; what was changed through `data` counts no version."""
    if now is None or before is None:
        return now is not before
    return now.shape != before.shape or not torch.equal(now, before)


def _version(buffer: Tensor | None) -> tuple[int, int]:
    """Return what differs after a buffer was changed or replaced; -1 for one that does not count its changes."""
    return id(buffer), -1 if buffer is None or buffer.is_inference() else buffer._version


def _put_back(now: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> None:
    """Let a module's buffers be the tensors that they were; those that were not there go."""
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, buffer in before.items():
        if name not in now or now[name] is not buffer:
            now[name] = buffer


def _take_hooks(module: nn.Module) -> Callable[[], None]:
    """Remove a module's forward hooks but those of adapters, and return a function that restores them."""
    taken = {name: getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    for name, hooks in taken.items():
        own = {key: hook for key, hook in hooks.items() if isinstance(hook, AdapterHook)}
        setattr(module, name, OrderedDict(own))

    def restore() -> None:
        for name, hooks in taken.items():
            setattr(module, name, hooks)

    return restore
