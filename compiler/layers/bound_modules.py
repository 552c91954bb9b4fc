"""Bind selected layers in the module tree: they become subclasses of themselves that call our operators.

A layer keeps its identity: the same object, parameters, state-dict keys, hooks and `isinstance` answers. Only its
class is replaced, by a subclass whose forward reaches the operator while its site is active. Sites are therefore known
by name, and survive torch.compile, checkpointing, wrapping and deepcopy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError, listed, repeated_layers
from trainc.compiler.layers.hooked_layers import (
    BoundCheckpoint,
    BoundHooks,
    checkpoint_runner,
)
from trainc.compiler.layers.random_layers import BoundDropout
from trainc.compiler.layers.registry import bound_class
from trainc.compiler.layers.site_state import BoundLayer, SiteState
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.layer_hook import LayerHookSite
from trainc.compiler.method.sites import Rewrite
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
        classes, state = wanted.setdefault(name, ([], SiteState(name, rewrite.views)))
        if bound not in classes:
            classes.append(bound)
        return state

    for name in rewrite.checkpointed:  # outside of all else
        want(name, BoundCheckpoint).checkpoint = checkpoint_runner()
    # Hooks go outside of what measures: they see the layer's result.
    done = {site.module for site, done in rewrite.replaced() if done}
    for hook in rewrite.hooks:
        if hook.hook.replaces and hook.module in done:
            continue
        want(hook.module, BoundHooks).hooks.append(hook)
    if rewrite.share_dropout:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                want(name, BoundDropout).shares_mask = True
    for site in rewrite.measured:
        want(site.module, bound_class(site)).measured = site
    for site in rewrite.layers:
        if site.tied is not None:
            wanted[site.module][1].partner = wanted[site.tied][1]
    for name, (classes, state) in wanted.items():
        state.hooks = _inside_out(state.hooks)
        module = model.get_submodule(name)
        if isinstance(module, BoundLayer):
            raise SiteError(f"`{name}` is part of another program: call its `unbind` first")
        module.__class__ = _subclass(tuple(classes), cast("Any", type(module)))
        module.trainc = state  # type: ignore[assignment]
    return Sites(model, rewrite)


def _inside_out(hooks: Sequence[LayerHookSite]) -> list[LayerHookSite]:
    """Return a layer's hooks, the innermost first: what replaces its forward pass, then the first clause's.

    Of those that change one weight the last clause's is innermost: it is given what the others made of the weight.
    """

    def place(numbered: tuple[int, LayerHookSite]) -> tuple[bool, bool, bool, int]:
        number, site = numbered
        hook = site.hook
        order = -number if hook.for_weight else number
        return not hook.replaces, hook.outermost, not hook.for_weight, order

    return [site for _, site in sorted(enumerate(hooks), key=place)]


class Sites:
    """The sites of one model: activated before a forward pass, read after the backward pass.

    `layers` are the bound layers; wrappers of the model hold the same objects.
    """

    def __init__(self, model: nn.Module, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self.layers: list[BoundLayer] = [m for m in model.modules() if isinstance(m, BoundLayer)]

    def __repr__(self) -> str:
        shown = (f"{m.trainc.name or 'the model'}: {m.trainc.description()}" for m in self.layers)
        return f"Sites({'; '.join(shown)})"

    def activate(
        self,
        example_index: ExampleIndex,
        scalars: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        now: Rewrite | None = None,
        inputs: Any = None,
    ) -> None:
        """Give every site fresh probes and this step's scalars; call before each forward pass.

        `now` has the hooks and the views of this step, which may be fewer than those of the rewrite. `inputs` are those
        of the model, for hooks that read them.
        """
        now = self.rewrite if now is None else now
        rows = now.views * example_index.all_rows
        which = {site.index for site in now.hooks}
        self.open_hooks(now.views, which, scalars, inputs, rows=rows)
        measuring = {site.module for site in now.measured}
        for module in self.layers:
            state = module.trainc
            state.active = state.measured is None or state.measured.module in measuring
            _require_train_mode(module, state)
            state.views, state.example_index, state.probe = now.views, example_index, None
            state.ran = False
            if state.measured is not None and state.active:
                shape = [example_index.count, len(state.measured.parameters)]
                if state.measured.per_example_gradients:
                    shape.append(module.weight.numel())  # type: ignore[attr-defined]
                state.probe = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    def open_hooks(
        self,
        views: int,
        which: Collection[int],
        scalars: Mapping[str, Tensor],
        inputs: Any = None,
        *,
        captured: bool = False,
        rows: int | None = None,
    ) -> None:
        """Let the hooks of these indices run, and no others, with these numbers; torch.compile can trace it."""
        shared = views > 1 and self.rewrite.share_dropout
        seen = {"captured": captured, "rows": rows, "shared": shared, "inputs": inputs}
        for module in self.layers:
            state = module.trainc
            state.open = tuple(
                (site.hook, site.context(views, scalars, **seen))
                for site in state.hooks
                if site.index in which
            )

    def states(self) -> list[SiteState]:
        """Return what every site has of this micro-batch, for `restore`."""
        return [copy(module.trainc) for module in self.layers]

    def restore(self, states: Iterable[SiteState], _: object = None) -> None:
        """Give every site what it had of a micro-batch."""
        for module, state in zip(self.layers, states, strict=False):
            module.trainc.of_micro_batch(state)

    def deactivate(self) -> None:
        """Let every site run the user's own layer."""
        for module in self.layers:
            module.trainc.deactivate()

    def probes(self) -> dict[str, Tensor]:
        """Return the active probes by module name."""
        states = [module.trainc for module in self.layers]
        return {s.measured.module: s.probe for s in states if s.measured and s.probe is not None}

    @contextmanager
    def in_pass(self) -> Iterator[None]:
        """Say to every site, inside this block, that it runs for the step, be it with gradients or without."""
        for module in self.layers:
            module.trainc.in_pass = True
        try:
            yield
        finally:
            for module in self.layers:
                module.trainc.in_pass = False

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """Inside this block, run the model as the user wrote it, even if sites are active."""
        states = [
            (m.trainc, m.trainc.active, m.trainc.open, m.trainc.checkpoint) for m in self.layers
        ]
        for state, *_ in states:
            state.active, state.open, state.checkpoint = False, (), None
        try:
            yield
        finally:
            for state, active, hooks, checkpoint in states:
                state.active, state.open, state.checkpoint = active, hooks, checkpoint

    def unbind(self) -> None:
        """Give every layer its own class back."""
        for module in self.layers:
            module.__class__ = module.unbound  # type: ignore[assignment]
            del module.trainc
        self.layers = []

    @contextmanager
    def count_calls(self) -> Iterator[dict[str, int]]:
        """Count how often each measuring or hooked site runs forward inside this block.

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
        if not counts:
            return
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


def _require_train_mode(module: Any, state: SiteState) -> None:
    """Raise SiteError for a layer in eval mode that a clause measures, or whose random change it would leave out."""
    if module.training or state.also_in_eval:
        return
    if (state.active and state.measured) or any(hook.draws for hook, _ in state.open):
        raise SiteError(
            f"`{state.name}` is in eval mode, where a clause cannot act on it ({state.description()}): call"
            " `model.train()` before the step, or, to keep this layer in eval mode, exclude it from `on`"
        )
