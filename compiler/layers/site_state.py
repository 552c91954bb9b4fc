"""What a bound layer carries, and what the classes of all bound layers share."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.sites import MeasuredSite, NoiseSite


class SiteState:
    """The state of a site: what it measures or adds, and the tensors of the micro-batch while it is active."""

    def __init__(self, views: int) -> None:
        self.views = views
        self.measured: MeasuredSite | None = None
        self.noise: NoiseSite | None = None
        self.partner: SiteState | None = None
        """The layer that shares this one's weight."""
        self.example_index = ExampleIndex(0)
        self.active = False
        self.also_in_eval = False
        """Whether the operator runs in evaluation mode too."""
        self.shared_ids = False
        """Whether an embedding looks up ids that all examples share, such as positions."""
        self.probe: Tensor | None = None
        self.sigma: Tensor | None = None
        self.key: Tensor | None = None
        self.first_example: Tensor | None = None
        self.lookup: tuple[Tensor, Tensor] | None = None
        """The auxiliary rows and the ids of an embedding's forward pass, for the head that shares its weight."""

    @property
    def name(self) -> str:
        """The layer's name in the user's model."""
        site = self.measured or self.noise
        return "a BatchNorm layer" if site is None else site.module

    @property
    def delivers(self) -> bool:
        """Whether this site must run in every step: it measures, or adds noise."""
        return self.measured is not None or (self.noise is not None and self.noise.index >= 0)

    def partner_lookup(self) -> tuple[Tensor, Tensor]:
        """Return the `lookup` of the embedding that shares the weight; raises SiteError when that has not run."""
        if self.partner is None or self.partner.lookup is None:
            raise SiteError(
                f"`{self.name}` shares its weight with an embedding that has not run before it in this forward pass."
                " Exclude one of the two from `on`"
            )
        return self.partner.lookup

    def deactivate(self) -> None:
        """Let the layer run the user's own forward pass."""
        self.active = False
        self.probe = self.lookup = None


class BoundLayer:
    """Base of the classes that `replace_layers` makes; `unbound` is the user's own class."""

    unbound: type[nn.Module]
    trainc: SiteState

    def forward(self, x: Tensor) -> Tensor:
        """Run the operator while the site is active, else the user's own layer."""
        return self.run_operator(x) if self.reaches_operator() else self._run_unbound(x)

    def run_operator(self, x: Tensor) -> Tensor:
        """Return the layer's result by the operator of a subclass; without one, the user's own."""
        return self._run_unbound(x)

    def _run_unbound(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x))  # type: ignore[misc]

    def reaches_operator(self) -> bool:
        state, training = self.trainc, self.training  # type: ignore[attr-defined]
        return state.active and (training or state.also_in_eval) and torch.is_grad_enabled()


def join_views(state: SiteState, x: Tensor) -> Tensor:
    """Return x (views * B, ...) as (B, views, ...): an example's views together contribute to the gradient.

    So do the rows of a group: (groups * n, ...) becomes (groups, n, ...).
    """
    if state.example_index.rows > 1:
        require_one_view(state)
        grouped: Tensor = x.unflatten(0, (-1, state.example_index.rows))
        return grouped
    return x if state.views == 1 else x.unflatten(0, (state.views, -1)).transpose(0, 1)


def separate_views(state: SiteState, y: Tensor) -> Tensor:
    """Undo `join_views` on a layer's result."""
    if state.example_index.rows > 1:
        return y.flatten(0, 1)
    return y if state.views == 1 else y.transpose(0, 1).flatten(0, 1)


def checked_probe(state: SiteState, x: Tensor) -> Tensor:
    """Return the site's probe; raises ExampleAxisUnknown unless the first axis of `x` is the example axis."""
    probe = state.probe
    assert state.measured is not None
    assert probe is not None
    if x.shape[0] != probe.shape[0]:
        raise ExampleAxisUnknown(
            f"`{state.measured.module}` gets an input of shape {tuple(x.shape)}, but the batch has"
            f" {probe.shape[0]} examples. Per-example norms need the examples on the first axis: exclude the layer"
            " from `on`"
        )
    return probe


def require_one_view(state: SiteState) -> None:
    """Raise SiteError for a layer that cannot join an example's two views."""
    if state.views > 1:
        raise SiteError(
            f"`{state.name}` cannot be measured while a regularizer passes every example twice: this kind of layer"
            " cannot join the two views. Exclude the layer from `on`"
        )
