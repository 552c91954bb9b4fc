"""Ghost noise: the noise that statistics of small batches would put on activations, without normalizing by them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering

_CHANNELS_FIRST = ("_BatchNorm", "_InstanceNorm", "GroupNorm", "LayerNorm2d")
_CHANNELS_LAST = ("LayerNorm", "RMSNorm")


class GhostNoise(Construct):
    """Shifts and scales what norms give, example by example, as the statistics of a ghost batch deviate.

    For each example `size` examples of its micro-batch are drawn, with replacement: its ghost batch. With
    mean m_g and variance v_g of a channel over the ghost batch, and m and v over the micro-batch, the
    output x becomes (x - (m_g - m)) / sqrt((v_g + eps) / (v + eps)). No gradient runs through the
    statistics. It is the noise of BatchNorm over `size` examples, without its dependence between them, and
    behind any norm: channels are the second axis of BatchNorm, GroupNorm and InstanceNorm, and the last
    of LayerNorm and RMSNorm. Published networks have it between a norm and its weight and bias. Each view
    of the examples has statistics of its own, and each replica. Evaluation has no noise.
    """

    cite: ClassVar = (
        "Kosson, Fan and Jaggi, Ghost Noise for Regularizing Deep Neural Networks, AAAI 2024, "
        "arXiv:2305.17205"
    )
    usage: ClassVar = "normalize ghost_noise { size = 16 }"
    targets: ClassVar = "modules"
    default_on: ClassVar = "role(norm)"
    effects: ClassVar = (
        Effect("forward", "add the noise of ghost statistics", ("inputs",), ("forward",)),
    )
    division: ClassVar = (
        "ghost batches are drawn from a micro-batch, whose statistics they are compared with"
    )

    size: int = Field(ge=1, description="examples of a ghost batch; fewer are more noise")
    shift: bool = Field(default=True, description="whether means deviate")
    scale: bool = Field(default=True, description="whether variances deviate")
    eps: float = Field(default=1e-3, gt=0, description="what is added to variances")

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report modules that are no norms, and a clause without noise."""
        for module in bound.modules:
            if _channel_axis(module.types) is None:
                yield Problem(
                    "wrong-target-kind",
                    f"`{module.name}` is a {module.types[0]}; which of its axes has the channels is not known",
                    help="select norm layers: `& role(norm)`",
                )
                return
        if not (self.shift or self.scale):
            message = "neither means nor variances deviate, so that the clause does nothing"
            yield Problem("no-effect", message, field="scale", help="remove the clause")

    def lower(self, to: Lowering) -> None:
        """Put the noise behind every norm."""
        for module in to.modules():
            axis = _channel_axis(module.types)
            assert axis is not None
            to.layer(module.name, Deviate(self.size, axis, self.shift, self.scale, self.eps))

    def reference(self, x: Tensor, ghosts: Tensor) -> Tensor:
        """Return noisy (B, C, ...), by definition; `ghosts` (B, size) are the examples of each ghost batch."""
        import torch

        axes = [0, *range(2, x.dim())]
        out = []
        with torch.no_grad():
            mean, var = x.mean(axes), x.var(axes, correction=0)
        for example, ghost in zip(x, ghosts, strict=True):
            with torch.no_grad():
                own = x[ghost]
                shift = own.mean(axes) - mean
                scale = ((own.var(axes, correction=0) + self.eps) / (var + self.eps)).sqrt()
            shape = [-1, *[1] * (x.dim() - 2)]
            y = example - shift.view(shape) if self.shift else example
            out.append(y / scale.view(shape) if self.scale else y)
        return torch.stack(out)


def _channel_axis(types: tuple[str, ...]) -> int | None:
    """Return the axis of a norm's channels by the names of its classes; None where it is not known."""
    for name in types:
        if name in _CHANNELS_FIRST:
            return 1
        if name.endswith(_CHANNELS_LAST):
            return -1
    return None


@dataclass(frozen=True)
class Deviate(LayerHook):
    """Puts the deviations of resampled statistics on the output of a norm."""

    size: int
    axis: int
    shift: bool
    scale: bool
    eps: float

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Return the noisy output."""
        at.check_examples(y, "Ghost noise")
        channels_last = y if self.axis == -1 else y.movedim(1, -1)
        x: Tensor = channels_last.unflatten(0, (at.views, -1))
        shift, scale = self._deviations(x.detach(), at)
        shape = (*x.shape[:2], *[1] * (x.dim() - 3), x.shape[-1])
        z: Tensor = x - shift.view(shape) if self.shift else x
        z = (z / scale.view(shape) if self.scale else z).flatten(0, 1)
        z = z if self.axis == -1 else z.movedim(-1, 1)
        return z if z.dtype == y.dtype else z.to(y.dtype)

    def _deviations(self, x: Tensor, at: LayerContext) -> tuple[Tensor, Tensor]:
        """Return by view, example and channel what the mean differs by and the deviation's ratio, of (V, B, ..., C)."""
        import torch

        from trainc.kernels.noise.uniforms import uniform

        views, rows, channels = x.shape[0], x.shape[1], x.shape[-1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(views, rows, -1, channels)
        centered = wide - wide.mean((1, 2), keepdim=True)
        means, squares = centered.mean(2), centered.square().mean(2)
        like = wide.new_ones((views * rows, self.size))
        drawn = (at.draw(uniform, like) * rows).long().clamp(max=rows - 1)
        # How often each example of the batch is in each ghost batch: (V, B, B).
        drawn = drawn.view(views, rows, self.size)
        share = torch.zeros((views, rows, rows), dtype=means.dtype, device=x.device)
        share = (
            share.scatter_add(2, drawn, torch.full_like(drawn, 1, dtype=means.dtype)) / self.size
        )
        shift = share @ means
        var = (share @ squares - shift.square()).clamp(min=0)
        whole = squares.mean(1, keepdim=True)
        return shift, ((var + self.eps) / (whole + self.eps)).sqrt()
