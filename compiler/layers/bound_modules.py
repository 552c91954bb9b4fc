"""Bind selected layers in the module tree: they become subclasses of themselves that call our operators.

A layer keeps its identity: the same object, parameters, state-dict keys, hooks and `isinstance` answers. Only its
class is replaced, by a subclass whose forward reaches the operator while its site is active. Sites are therefore known
by name, and survive torch.compile, checkpointing, wrapping and deepcopy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError, listed, repeated_layers
from trainc.compiler.layers.ghost_batch_norm import BoundGhostBatchNorm
from trainc.compiler.layers.random_layers import BoundDropout, BoundNoise
from trainc.compiler.layers.registry import bound_class
from trainc.compiler.layers.site_state import BoundLayer, SiteState
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.sites import NoiseSite, Rewrite
from trainc.compiler.model.eager import uncompiled


@cache
def _subclass(bound: tuple[type[BoundLayer], ...], original: Any) -> Any:
    return type(
        original.__name__,
        (*bound, original),
        {"unbound": original, "__module__": original.__module__},
    )


def replace_layers(model: nn.Module, rewrite: Rewrite) -> Sites:
    """Replace the classes of the selected layers, and return the sites; an empty rewrite changes nothing.

    Raises SiteError for a layer that belongs to a program already.
    """
    wanted: dict[str, tuple[list[type[BoundLayer]], SiteState]] = {}

    def want(name: str, bound: type[BoundLayer]) -> SiteState:
        classes, state = wanted.setdefault(name, ([], SiteState(rewrite.views)))
        classes.append(bound)
        return state

    # Noise goes outside of what measures: it multiplies the layer's result.
    for noise in rewrite.noises:
        want(noise.module, BoundNoise).noise = noise
    if rewrite.pairing is not None:
        for i, (name, module) in enumerate(model.named_modules()):
            if isinstance(module, nn.Dropout):
                want(name, BoundDropout).noise = NoiseSite(name, -1 - i)
    for name in rewrite.ghosts:
        want(name, BoundGhostBatchNorm)
    for site in rewrite.measured:
        if site.layer_type == "batch_norm":
            wanted[site.module][1].measured = site
        else:
            want(site.module, bound_class(site)).measured = site
    for site in rewrite.layers:
        if site.tied is not None:
            wanted[site.module][1].partner = wanted[site.tied][1]
    for name, (classes, state) in wanted.items():
        module = model.get_submodule(name)
        if isinstance(module, BoundLayer):
            raise SiteError(f"`{name}` is part of another program: call its `unbind` first")
        module.__class__ = _subclass(tuple(classes), cast("Any", type(module)))
        module.trainc = state  # type: ignore[assignment]
    return Sites(model, rewrite)


class Sites:
    """The sites of one model: activated before a forward pass, read after the backward pass.

    `layers` are the bound layers; wrappers of the model hold the same objects.
    """

    def __init__(self, model: nn.Module, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self.layers: list[BoundLayer] = [m for m in model.modules() if isinstance(m, BoundLayer)]

    def activate(
        self,
        example_index: ExampleIndex,
        scalars: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        now: Rewrite | None = None,
    ) -> None:
        """Give every site fresh probes and this step's scalars; call before each forward pass.

        `now` has the noise and the views of this step, which may be fewer than those of the rewrite.
        """
        now = self.rewrite if now is None else now
        noisy = {site.module for site in now.noises}
        for module in self.layers:
            state = module.trainc
            state.active, state.views = True, now.views
            state.example_index = example_index
            if state.measured is not None:
                shape = [example_index.count, len(state.measured.parameters)]
                if state.measured.per_example_gradients:
                    shape.append(module.weight.numel())  # type: ignore[attr-defined]
                state.probe = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
            if state.noise is not None and state.noise.index >= 0:
                adds = state.noise.module in noisy
                state.sigma = scalars[state.noise.scalar] if adds else None
                state.key = scalars.get("key")
                state.first_example = scalars.get("first_example")

    def deactivate(self) -> None:
        """Let every site run the user's own layer."""
        for module in self.layers:
            module.trainc.deactivate()

    def probes(self) -> dict[str, Tensor]:
        """Return the active probes by module name."""
        states = [module.trainc for module in self.layers]
        return {s.measured.module: s.probe for s in states if s.measured and s.probe is not None}

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """Inside this block, run the model as the user wrote it, even if sites are active."""
        states = [(m, m.trainc.active) for m in self.layers]
        for module, _ in states:
            module.trainc.active = False
        try:
            yield
        finally:
            for module, active in states:
                module.trainc.active = active

    def unbind(self) -> None:
        """Give every layer its own class back."""
        for module in self.layers:
            module.__class__ = module.unbound  # type: ignore[assignment]
            del module.trainc
        self.layers = []

    @contextmanager
    def count_calls(self) -> Iterator[dict[str, int]]:
        """Count how often each measuring or noisy site runs forward inside this block.

        Compiled parts run uncompiled here: code that was compiled for another program calls no hooks.
        """
        watched = [module for module in self.layers if module.trainc.delivers]
        counts = {module.trainc.name: 0 for module in watched}

        def count(module: Any, *_: Any) -> None:
            counts[module.trainc.name] += 1

        handles = [cast(nn.Module, module).register_forward_hook(count) for module in watched]
        try:
            with uncompiled():
                yield counts
        finally:
            for handle in handles:
                handle.remove()

    def check_coverage(self, counts: Mapping[str, int]) -> None:
        """Raise SiteError when a site of the plan did not run, or a measured layer ran twice."""
        silent = [name for name, count in counts.items() if count == 0]
        if silent:
            raise SiteError(
                f"{listed(silent)} did not run in the forward pass, but the plan needs a result from it. A module whose"
                " weight is used directly by its parent, as in nn.MultiheadAttention, is never called: exclude it"
                " from `on`"
            )
        measured = {site.module for site in self.rewrite.measured}
        again = [name for name, count in counts.items() if count > 1 and name in measured]
        if again:
            raise repeated_layers(again)
