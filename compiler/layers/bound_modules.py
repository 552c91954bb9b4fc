"""Sites in the module tree: selected layers become drop-in subclasses of themselves that call our operators.

A layer keeps its identity: the same object, parameters, state-dict keys, hooks and `isinstance` answers; only its
class is replaced by a subclass whose forward reaches the operator while its site is armed. Sites are therefore known
by name, and survive torch.compile, checkpointing, wrapping and deepcopy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError, listed, repeated
from trainc.compiler.layers.ghost_batch_norm import BoundGhostBatchNorm
from trainc.compiler.layers.registry import behaviour
from trainc.compiler.layers.site_state import Bound, SiteState
from trainc.compiler.method.example_index import Division
from trainc.compiler.method.sites import MeasuredSite, NoiseSite, Rewrite
from trainc.compiler.model.eager import uncompiled
from trainc.kernels.noise.multiplicative_noise import multiplicative_noise

if TYPE_CHECKING:
    from collections.abc import Mapping


class _BoundNoise(Bound):
    def forward(self, x: Tensor) -> Tensor:
        out = cast(Tensor, super().forward(x))  # type: ignore[misc]
        if not self.reaches_operator():
            return out
        armed, site = self.trainc, cast(NoiseSite, self.trainc.noise)
        assert armed.sigma is not None
        assert armed.key is not None
        return multiplicative_noise(
            out, armed.sigma, armed.key, site.index, armed.views, site.share, armed.first_example
        )


class _BoundDropout(Bound):
    """Both views of an example share the dropout mask, so that their distance measures the noise alone."""

    def forward(self, x: Tensor) -> Tensor:
        own = cast(nn.Dropout, self)
        if not self.reaches_operator() or own.p == 0.0:
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        half = x.shape[0] // self.trainc.views
        mask = nn.functional.dropout(torch.ones_like(x[:half]), own.p, training=True)
        return x * torch.cat([mask] * self.trainc.views)


@cache
def _bound_class(behaviours: tuple[Any, ...], original: Any) -> Any:
    return type(
        original.__name__,
        (*behaviours, original),
        {"unbound": original, "__module__": original.__module__},
    )


def bind(model: nn.Module, rewrite: Rewrite) -> Sites:
    """Replace the classes of the selected layers; an empty rewrite touches nothing."""
    wanted: dict[str, tuple[list[type], SiteState]] = {}

    def want(name: str, kind: type) -> SiteState:
        behaviours, armed = wanted.setdefault(name, ([], SiteState(rewrite.views)))
        behaviours.append(kind)
        return armed

    # Noise goes outside of what measures: it multiplies the layer's result.
    for noise in rewrite.noises:
        want(noise.module, _BoundNoise).noise = noise
    if rewrite.pairing is not None:
        for i, (name, module) in enumerate(model.named_modules()):
            if isinstance(module, nn.Dropout):
                want(name, _BoundDropout).noise = NoiseSite(name, -1 - i)
    for name in rewrite.ghosts:
        want(name, BoundGhostBatchNorm)
    for site in rewrite.measured:
        if site.form == "batch_norm":
            wanted[site.module][1].measured = site
        else:
            want(site.module, behaviour(site)).measured = site
    for site in rewrite.layers:
        if site.tied is not None:
            wanted[site.module][1].partner = wanted[site.tied][1]
    for name, (behaviours, armed) in wanted.items():
        module = model.get_submodule(name)
        if isinstance(module, Bound):
            raise SiteError(f"`{name}` is already bound to a program: unbind that one first")
        module.__class__ = _bound_class(tuple(behaviours), cast("Any", type(module)))
        module.trainc = armed  # type: ignore[assignment]
    return Sites(model, rewrite)


class Sites:
    """The bound sites of one model: armed before a forward pass, read after the backward pass."""

    def __init__(self, model: nn.Module, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self._bound: list[Bound] = [m for m in model.modules() if isinstance(m, Bound)]
        self._numel = {
            site.module: model.get_parameter(cast(str, site.weight)).numel()
            for site in rewrite.measured
            if site.per_example_gradients
        }

    def bound(self) -> list[Bound]:
        """Return the bound layers; wrappers of the model hold the same objects."""
        return self._bound

    def arm(
        self,
        division: Division,
        scalars: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Give every site fresh probes and this step's scalars; call before each forward pass."""
        for module in self.bound():
            armed = module.trainc
            armed.active = True
            armed.division = division
            if armed.measured is not None:
                shape = self._probe_shape(armed.measured, division.count)
                armed.probe = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
            if armed.noise is not None and armed.noise.index >= 0:
                armed.sigma, armed.key = scalars[armed.noise.scalar], scalars["key"]
                armed.first_example = scalars.get("first_example")

    def _probe_shape(self, site: MeasuredSite, units: int) -> tuple[int, ...]:
        columns = len(site.parameters)
        if not site.per_example_gradients:
            return units, columns
        return units, columns, self._numel[site.module]

    def disarm(self) -> None:
        """Let every site run as the user's own layer."""
        for module in self.bound():
            module.trainc.rest()

    def probes(self) -> dict[str, Tensor]:
        """Return the armed probes by module name."""
        armed = [module.trainc for module in self.bound()]
        return {a.measured.module: a.probe for a in armed if a.measured and a.probe is not None}

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the model as the user wrote it inside this block, whatever was armed."""
        states = [(m, m.trainc.active) for m in self.bound()]
        for module, _ in states:
            module.trainc.active = False
        try:
            yield
        finally:
            for module, active in states:
                module.trainc.active = active

    def unbind(self) -> None:
        """Give every layer its own class back."""
        for module in self._bound:
            module.__class__ = module.unbound  # type: ignore[assignment]
            del module.trainc
        self._bound = []

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Count how often each measuring or noisy site runs forward inside this block.

        Compiled parts run as they are written: code that another program of this model had compiled knows no hook.
        """
        watched = {m.trainc.name: m for m in self.bound() if m.trainc.delivers}
        counts = dict.fromkeys(watched, 0)

        def hook(name: str) -> Callable[..., None]:
            def count(*_: Any) -> None:
                counts[name] += 1

            return count

        handles = [
            cast(nn.Module, m).register_forward_hook(hook(name)) for name, m in watched.items()
        ]
        try:
            with uncompiled():
                yield counts
        finally:
            for handle in handles:
                handle.remove()

    def check_coverage(self, counts: Mapping[str, int]) -> None:
        """Raise when a site the plan expects did not run, or a measured norm ran twice."""
        silent = [name for name, count in counts.items() if count == 0]
        if silent:
            raise SiteError(
                f"{listed(silent)} took no part in the forward pass: the plan expects a result from there. "
                "A module whose weight is used directly by its parent (as in nn.MultiheadAttention) never runs itself"
            )
        measured = {site.module for site in self.rewrite.measured}
        again = [name for name, count in counts.items() if count > 1 and name in measured]
        if again:
            raise repeated(again)
