"""What a bound layer carries, and how its classes reach an operator: shared by all kinds of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.compiler.method.example_index import Division

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.method.sites import MeasuredSite, NoiseSite


class SiteState:
    """What a site carries: its description and, while armed, the tensors of the running micro-batch."""

    def __init__(self, views: int) -> None:
        self.views = views
        self.measured: MeasuredSite | None = None
        self.noise: NoiseSite | None = None
        self.partner: SiteState | None = None
        """The layer this one shares its weight with."""
        self.division = Division(0)
        self.active = self.any_mode = False
        self.shared = False
        """Whether an embedding looks up ids that all examples share, such as positions."""
        self.probe: Tensor | None = None
        self.sigma: Tensor | None = None
        self.key: Tensor | None = None
        self.first_example: Tensor | None = None
        self.tie: tuple[Tensor, Tensor] | None = None
        """What an embedding leaves for the head that shares its weight: its auxiliary rows and the ids."""

    @property
    def name(self) -> str:
        """The layer's name in the user's model."""
        site = self.measured or self.noise
        return "a BatchNorm layer" if site is None else site.module

    @property
    def delivers(self) -> bool:
        """Say whether a result of this site is expected in every step."""
        return self.measured is not None or (self.noise is not None and self.noise.index >= 0)

    def partner_left(self) -> tuple[Tensor, Tensor]:
        """Return what the tied embedding left in this forward pass; raises SiteError when it has not run."""
        if self.partner is None or self.partner.tie is None:
            raise SiteError(
                f"`{self.name}` shares its weight with an embedding that has not run before it in this forward pass:"
                " measure one of the two only where both take part"
            )
        return self.partner.tie

    def rest(self) -> None:
        """Let the layer run as the user's own."""
        self.active = False
        self.probe = self.tie = None


class Bound:
    """Marks a class made by `bind`; `unbound` is the user's own class."""

    unbound: type[nn.Module]
    trainc: SiteState

    def reaches_operator(self) -> bool:
        armed, training = self.trainc, self.training  # type: ignore[attr-defined]
        return armed.active and (training or armed.any_mode) and torch.is_grad_enabled()


def joined_views(armed: SiteState, x: Tensor) -> Tensor:
    """Return x (views * B, ...) as (B, views, ...): an example's views together contribute to the gradient.

    A group's rows do so too: (groups * n, ...) becomes (groups, n, ...).
    """
    if armed.division.rows > 1:
        one_view(armed)
        grouped: Tensor = x.unflatten(0, (-1, armed.division.rows))
        return grouped
    return x if armed.views == 1 else x.unflatten(0, (armed.views, -1)).transpose(0, 1)


def parted_views(armed: SiteState, y: Tensor) -> Tensor:
    """Undo `joined_views` on a layer's result."""
    if armed.division.rows > 1:
        return y.flatten(0, 1)
    return y if armed.views == 1 else y.transpose(0, 1).flatten(0, 1)


def checked_probe(armed: SiteState, x: Tensor) -> Tensor:
    """Return the site's probe if the leading axis of `x` is the example axis."""
    probe = armed.probe
    assert armed.measured is not None
    assert probe is not None
    if x.shape[0] != probe.shape[0]:
        raise ExampleAxisUnknown(
            f"`{armed.measured.module}` sees a tensor of shape {tuple(x.shape)}, but the batch has"
            f" {probe.shape[0]} examples: its first axis is not the example axis, so per-example norms"
            " cannot be taken there"
        )
    return probe


def one_view(armed: SiteState) -> None:
    """Refuse a layer that cannot see an example's two views as one."""
    if armed.views > 1:
        raise SiteError(
            f"`{armed.name}` cannot be measured while a regularizer passes every example twice:"
            " the squared norm of a sum is not the sum of squared norms"
        )
