"""Layers whose forward pass is surrounded where they stand: by hooks, or by an activation checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.site_state import BoundLayer, SiteState
from trainc.compiler.model.adapters import with_adapters
from trainc.compiler.model.undisturbed import own_generators


class BoundHooks(BoundLayer):
    """Runs the open hooks around the layer, from the inside out as `SiteState.open` has them.

    The layer's adapters are part of what hooks change and see; those of its weight, and what replaces its own forward
    pass, are inside of them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the outermost hook gives; in evaluation mode, what the layer gives."""
        call = super().forward
        own = cast(nn.Module, self)
        if own.training:
            adapted = False
            for hook, at in self.trainc.open:
                if not (adapted or hook.below_adapters):
                    call, adapted = with_adapters(own, call), True
                call = partial(hook.forward, own, call, at)
        return call(*args, **kwargs)


class BoundCheckpoint(BoundLayer):
    """Keeps only the inputs of a module, and runs it again in the backward pass: an activation checkpoint.

    Hooks, and what measures, are inside of it. What they did in the first pass stands, and so do buffers and random
    numbers: see `_Before`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; with gradients as a checkpoint."""
        call = super().forward
        run = self.trainc.checkpoint
        if run is None or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return run(cast(nn.Module, self), self.trainc, call, args, kwargs)


@cache
def checkpoint_runner() -> Callable[..., Any]:
    """Return what runs a checkpoint; code that is being compiled calls it, and does not look inside."""
    return cast("Callable[..., Any]", torch.compiler.disable(_checkpointed))


def _checkpointed(
    module: nn.Module, state: SiteState, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    def contexts() -> tuple[_First, _Again]:
        before = _Before(module, state)
        return _First(before), _Again(before)

    call = call if state.compile is None else state.compile(call)
    return checkpoint(call, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _Before:
    """What the first pass of a module changes, as it was before that pass: buffers, and generators of its own.

    The second pass starts from it, so that it gives the same numbers, and leaves what the first one left: a running
    mean is updated once. Constant buffers such as causal masks are not kept. Which of those with several axes change,
    the first pass of all shows.
    """

    def __init__(self, module: nn.Module, state: SiteState) -> None:
        self.name, self.state = state.name, state
        self.generators = [(one, one.get_state()) for one in own_generators(module)]
        self.places = [
            (place, name, buffer)
            for place in (one._buffers for one in module.modules())
            for name, buffer in place.items()
            if buffer is not None
        ]
        self.versions = [*map(_version, self.places)]
        every = state.changing is None
        self.kept: dict[int, Tensor] = {
            i: buffer.detach().clone()
            for i, (_, name, buffer) in enumerate(self.places)
            if every or buffer.dim() < 2 or name in (state.changing or ())
        }

    def after_first(self) -> None:
        """Find the buffers with several axes that the first pass changed; raises SiteError for one not kept."""
        known = self.state.changing
        if known is None:
            known = self.state.changing = set()
        for i, (place, before) in enumerate(zip(self.places, self.versions, strict=True)):
            if place[2].dim() < 2 or _version(place) == before:
                continue
            if i not in self.kept:
                raise SiteError(
                    f"the buffer `{place[1]}` in `{self.name}` was constant in the first step and changes now, so that"
                    " an activation checkpoint has not kept its value for the second forward pass. Exclude"
                    f" `{self.name}` from `checkpoint_activations`"
                )
            known.add(place[1])
        self.kept = {
            i: buffer
            for i, buffer in self.kept.items()
            if self.places[i][2].dim() < 2 or self.places[i][1] in known
        }


def _version(place: tuple[dict[str, Tensor | None], str, Tensor]) -> tuple[int, int]:
    """Return what differs after the buffer at a place was changed or replaced."""
    now = place[0].get(place[1])
    return id(now), -1 if now is None or now.is_inference() else now._version


class _First:
    """Surrounds the first pass."""

    def __init__(self, before: _Before) -> None:
        self.before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.before.after_first()


class _Again:
    """Surrounds a second pass: it works on copies of what was before the first; a backward pass more has one more."""

    def __init__(self, before: _Before) -> None:
        self.before = before
        self.now: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self.states: list[tuple[torch.Generator, Tensor]] = []

    def __enter__(self) -> None:
        before = self.before
        self.states = [(one, one.get_state()) for one, _ in before.generators]
        for generator, state in before.generators:
            generator.set_state(state)
        self.now = [(place, name, place.get(name)) for place, name, _ in before.places]
        for i, value in before.kept.items():
            place, name, _ = before.places[i]
            place[name] = value.clone()

    def __exit__(self, *_: object) -> None:
        for generator, state in self.states:
            generator.set_state(state)
        for place, name, buffer in self.now:
            place[name] = buffer
