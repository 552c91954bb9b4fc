"""Sites in the module tree: selected layers become drop-in subclasses of themselves that call our operators.

A layer keeps its identity: the same object, parameters, state-dict keys, hooks and `isinstance` answers; only its
class is replaced by a subclass whose forward reaches the operator while its site is armed. Sites are therefore known
by name, and survive torch.compile, checkpointing, wrapping and deepcopy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trainc.compiler.rewrite import NoiseSite, NormSite, Rewrite
from trainc.kernels.layer_norm import layer_norm
from trainc.kernels.multiplicative_noise import multiplicative_noise
from trainc.kernels.rms_norm import rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping


class SiteError(Exception):
    """A site cannot do what the plan expects of it; the message names the module, `rule` the diagnostic."""

    rule = "site-not-delivered"


class ExampleAxisUnknown(SiteError):
    """A site sees a tensor whose first axis is not the example axis."""

    rule = "example-axis-unknown"


class Armed:
    """What a site carries: its description and, while armed, the tensors of the running micro-batch."""

    def __init__(self, site: NormSite | NoiseSite, views: int) -> None:
        self.site = site
        self.views = views
        self.active = False
        self.probe: Tensor | None = None
        self.sigma: Tensor | None = None
        self.key: Tensor | None = None
        self.first_example: Tensor | None = None


class _Bound:
    """Marks a class made by `bind`; `unbound` is the user's own class."""

    unbound: type[nn.Module]
    trainc: Armed

    def reaches_operator(self) -> bool:
        return self.trainc.active and self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]


class _BoundLayerNorm(_Bound):
    def forward(self, x: Tensor) -> Tensor:
        if not self.reaches_operator():
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        own = cast(nn.LayerNorm, self)
        joined = joined_views(self.trainc, x)
        probe = checked_probe(self.trainc, joined)
        shape = list(own.normalized_shape)
        y = layer_norm(joined, shape, own.weight, own.bias, probe, own.eps)
        return parted_views(self.trainc, y, x)


class _BoundRMSNorm(_Bound):
    def forward(self, x: Tensor) -> Tensor:
        if not self.reaches_operator():
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        site = cast(NormSite, self.trainc.site)
        weight = cast("Tensor | None", getattr(self, "weight", None))
        shape = list(weight.shape) if weight is not None else [x.shape[-1]]
        joined = joined_views(self.trainc, x)
        probe = checked_probe(self.trainc, joined)
        y = rms_norm(joined, shape, weight, probe, site.eps, site.casting)
        return parted_views(self.trainc, y, x)


class _BoundNoise(_Bound):
    def forward(self, x: Tensor) -> Tensor:
        out = cast(Tensor, super().forward(x))  # type: ignore[misc]
        if not self.reaches_operator():
            return out
        armed, site = self.trainc, cast(NoiseSite, self.trainc.site)
        assert armed.sigma is not None
        assert armed.key is not None
        return multiplicative_noise(
            out, armed.sigma, armed.key, site.index, armed.views, site.share, armed.first_example
        )


class _BoundDropout(_Bound):
    """Both views of an example share the dropout mask, so that their distance measures the noise alone."""

    def forward(self, x: Tensor) -> Tensor:
        own = cast(nn.Dropout, self)
        if not self.reaches_operator() or own.p == 0.0:
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        half = x.shape[0] // self.trainc.views
        mask = nn.functional.dropout(torch.ones_like(x[:half]), own.p, training=True)
        return x * torch.cat([mask] * self.trainc.views)


def joined_views(armed: Armed, x: Tensor) -> Tensor:
    """Return x (views * B, ...) as (B, views, ...): an example's views together contribute to the gradient."""
    return x if armed.views == 1 else x.unflatten(0, (armed.views, -1)).transpose(0, 1)


def parted_views(armed: Armed, y: Tensor, like: Tensor) -> Tensor:
    """Undo `joined_views`."""
    return y if armed.views == 1 else y.transpose(0, 1).reshape(like.shape)


def checked_probe(armed: Armed, x: Tensor) -> Tensor:
    """Return the site's probe if the leading axis of `x` is the example axis."""
    probe = armed.probe
    assert probe is not None
    if x.shape[0] != probe.shape[0]:
        raise ExampleAxisUnknown(
            f"`{armed.site.module}` sees a tensor of shape {tuple(x.shape)}, but the batch has"
            f" {probe.shape[0]} examples: its first axis is not the example axis, so per-example norms"
            " cannot be taken there"
        )
    return probe


_NORM_CLASSES = {"layer": _BoundLayerNorm, "rms": _BoundRMSNorm}


@cache
def _bound_class(behaviour: Any, original: Any) -> Any:
    return type(
        original.__name__,
        (behaviour, original),
        {"unbound": original, "__module__": original.__module__},
    )


def bind(model: nn.Module, rewrite: Rewrite) -> Sites:
    """Replace the classes of the selected layers; an empty rewrite touches nothing."""
    behaviours: list[tuple[NormSite | NoiseSite, type]] = [
        (n, _NORM_CLASSES[n.form]) for n in rewrite.norms
    ]
    behaviours += [(n, _BoundNoise) for n in rewrite.noises]
    if rewrite.pairing is not None:
        for i, (name, module) in enumerate(model.named_modules()):
            if isinstance(module, nn.Dropout):
                behaviours.append((NoiseSite(name, -1 - i), _BoundDropout))
    for site, behaviour in behaviours:
        module = model.get_submodule(site.module)
        if isinstance(module, _Bound):
            raise SiteError(f"`{site.module}` is already bound to a program: unbind that one first")
        module.__class__ = _bound_class(behaviour, cast("Any", type(module)))
        module.trainc = Armed(site, rewrite.views)  # type: ignore[assignment]
    return Sites(model, rewrite)


class Sites:
    """The bound sites of one model: armed before a forward pass, read after the backward pass."""

    def __init__(self, model: nn.Module, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self._bound: list[_Bound] = [m for m in model.modules() if isinstance(m, _Bound)]

    def bound(self) -> list[_Bound]:
        """Return the bound layers; wrappers of the model hold the same objects."""
        return self._bound

    def arm(
        self, examples: int, scalars: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Give every site fresh probes and this step's scalars; call before each forward pass."""
        for module in self.bound():
            armed = module.trainc
            armed.active = True
            if isinstance(armed.site, NormSite):
                columns = len(armed.site.parameters)
                armed.probe = torch.zeros(
                    examples, columns, dtype=dtype, device=device, requires_grad=True
                )
            elif armed.site.index >= 0:
                armed.sigma, armed.key = scalars[armed.site.scalar], scalars["key"]
                armed.first_example = scalars.get("first_example")

    def disarm(self) -> None:
        """Let every site run as the user's own layer."""
        for module in self.bound():
            module.trainc.active = False
            module.trainc.probe = None

    def probes(self) -> dict[str, Tensor]:
        """Return the armed probes by module name."""
        return {
            m.trainc.site.module: m.trainc.probe for m in self.bound() if m.trainc.probe is not None
        }

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
        """Count how often each measuring or noisy site runs forward inside this block."""
        counts = {m.trainc.site.module: 0 for m in self.bound() if _delivers(m.trainc)}

        def hook(name: str) -> Callable[..., None]:
            def count(*_: Any) -> None:
                counts[name] += 1

            return count

        handles = [
            cast(nn.Module, m).register_forward_hook(hook(m.trainc.site.module))
            for m in self.bound()
            if _delivers(m.trainc)
        ]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()

    def check_coverage(self, counts: Mapping[str, int]) -> None:
        """Raise when a site the plan expects did not run, or a measured norm ran twice."""
        silent = [name for name, count in counts.items() if count == 0]
        if silent:
            raise SiteError(
                f"{_listed(silent)} took no part in the forward pass: the plan expects a result from there. "
                "A module whose weight is used directly by its parent (as in nn.MultiheadAttention) never runs itself"
            )
        measured = {site.module for site in self.rewrite.norms}
        repeated = [name for name, count in counts.items() if count > 1 and name in measured]
        if repeated:
            raise SiteError(
                f"{_listed(repeated)} ran more than once in one forward pass: "
                "the squared norm of a sum is not the sum of squared norms, so its statistics would be wrong"
            )


def _delivers(armed: Armed) -> bool:
    return isinstance(armed.site, NormSite) or armed.site.index >= 0


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
