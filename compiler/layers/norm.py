"""LayerNorm, RMSNorm and layers of other libraries that compute the same, with per-example gradient norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainc.compiler.errors import NotMeasurable, SiteError
from trainc.compiler.layers.layer import result_with
from trainc.compiler.layers.site_state import (
    BoundLayer,
    SiteState,
    checked_probe,
    join_views,
    separate_views,
)
from trainc.compiler.method.example_units import ExampleUnits
from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.compiler.method.sites import NormSite
from trainc.kernels.norm.layer_norm import layer_norm
from trainc.kernels.norm.rms_norm import rms_norm

# Relative error below which a layer of another library counts as a LayerNorm or RMSNorm.
_SAME = 1e-4


class BoundLayerNorm(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        own = cast(nn.LayerNorm, self)
        joined = join_views(self.trainc, x)
        probe = checked_probe(self.trainc, joined)
        shape = list(own.normalized_shape)
        y = layer_norm(joined, shape, own.weight, own.bias, probe, own.eps)
        return separate_views(self.trainc, y)


class BoundRMSNorm(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        site = cast(NormSite, self.trainc.measured)
        weight = cast("Tensor | None", getattr(self, "weight", None))
        shape = list(weight.shape) if weight is not None else [x.shape[-1]]
        joined = join_views(self.trainc, x)
        probe = checked_probe(self.trainc, joined)
        y = rms_norm(joined, shape, weight, probe, site.eps, site.casting)
        return separate_views(self.trainc, y)


class BoundNormGradients(BoundLayer):
    """A norm with per-example gradients, not their norms alone, or whose examples are documents inside a row.

    The affine part is separate from the normalization, and every example has its own weight and bias: the layer's plus
    a probe of zeros. The gradient of that probe is the example's gradient.
    """

    def run_operator(self, x: Tensor) -> Tensor:
        site = cast(NormSite, self.trainc.measured)
        weight = cast(Tensor, self.weight)  # type: ignore[attr-defined]
        bias = cast("Tensor | None", getattr(self, "bias", None))
        shape = list(weight.shape)
        if site.layer_type == "layer":
            normal = functional.layer_norm(x, shape, None, None, cast(nn.LayerNorm, self).eps)
        else:
            normal = functional.rms_norm(x, shape, None, site.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        gain = weight.to(dtype) + _of_example(self.trainc, 0, x, shape)
        if site.casting == "gemma":
            gain = gain + 1
        y = normal.to(dtype) * gain
        if bias is not None:
            y = y + bias.to(dtype) + _of_example(self.trainc, 1, x, shape)
        return y.to(normal.dtype)


@dataclass(frozen=True)
class FusedNorm(LayerHook):
    """Computes a norm by one operator, with its backward pass: in a captured graph the passes put it in place."""

    fused_by: ClassVar = "fuse_norms"
    draws: ClassVar = False
    zero_is_identity: ClassVar = True

    norm: NormSite

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The operator of trainc that computes it."""
        return f"{self.norm.layer_type}_norm"

    def forward(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        at: LayerContext,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the normalized input."""
        if at.captured:
            return call(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        own, site = cast(nn.LayerNorm, layer), self.norm
        if site.layer_type == "layer":
            return layer_norm(x, list(own.normalized_shape), own.weight, own.bias, None, own.eps)
        weight = cast("Tensor | None", getattr(own, "weight", None))
        shape = list(
            getattr(own, "normalized_shape", [x.shape[-1]] if weight is None else weight.shape)
        )
        return rms_norm(x, shape, weight, None, site.eps, site.casting)

    def done_by_measuring(self, layer_type: str, units: ExampleUnits | None) -> bool:
        """Say whether the layer is measured as a norm: then that computes it by the same operator."""
        return layer_type in ("layer", "rms") and units is None


def _of_example(state: SiteState, column: int, x: Tensor, shape: list[int]) -> Tensor:
    """Return one parameter's probe over the positions of x: each has the entries of the example it belongs to."""
    assert state.probe is not None
    between = x.dim() - len(shape) - 1
    index = state.example_index.index
    if index is None:
        probe = checked_probe(state, x)
        return probe[:, column].view(probe.shape[0], *[1] * between, *shape)
    if x.shape[:2] != index.shape:
        raise SiteError(
            f"`{state.name}` gets an input of shape {tuple(x.shape)}, but the batch has (rows, tokens) ="
            f" {tuple(index.shape)}: `example = document` needs these two axes first. Exclude the layer from `on`"
        )
    per_token = state.probe[:, column][index]
    return per_token.view(*index.shape, *[1] * (between - 1), *shape)


def norm_site(name: str, module: nn.Module) -> NormSite:
    """Return the site of a norm: torch's own by its type, a class of another library by what it computes.

    Raises NotMeasurable for a layer that computes neither LayerNorm nor RMSNorm.
    """
    path = f"{name}." if name else ""
    own = {n: f"{path}{n}" for n, _ in module.named_parameters()}
    eps: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    layer_type: Literal["layer", "rms"] = "layer" if isinstance(module, nn.LayerNorm) else "rms"
    site = NormSite(name, layer_type, own.get("weight"), own.get("bias"), eps)
    known = nn.LayerNorm if layer_type == "layer" else nn.RMSNorm
    if isinstance(module, known):
        if type(module).forward is known.forward or _error(module, site) < _SAME:
            return site
    elif list(own) == ["weight"] and isinstance(eps, float):
        if _error(module, site) < _SAME:
            llama = NormSite(name, layer_type, site.weight, None, eps, "llama")
            return min(site, llama, key=lambda s: _error(module, s, half=True))
        gemma = NormSite(name, layer_type, site.weight, None, eps, "gemma")
        if _error(module, gemma) < _SAME:
            return gemma
    made = type(module).__name__
    raise NotMeasurable(
        f"`{name}` ({made}) does not compute what LayerNorm or RMSNorm does, so it cannot be measured."
        " Exclude the layer from `on`"
    )


def _error(module: nn.Module, site: NormSite, half: bool = False) -> float:
    """Return the mean error of our operator against the layer, relative to the layer's output.

    Weights and inputs are made up here (with `half` in bfloat16), so the layer may be on the meta device.
    """
    dtype = torch.bfloat16 if half else torch.float32
    made: dict[str, torch.nn.Parameter | None] = dict(module._parameters)
    for name, given in module.named_parameters():
        values = 1 + 0.5 * torch.arange(given.numel()).sin()
        made[name] = torch.nn.Parameter(values.to(dtype).view(given.shape))
    weight = made["weight"]
    if weight is None:
        return math.inf
    x = (3 * (1.3 * torch.arange(6 * weight.numel()) + 0.5).sin()).view(2, 3, *weight.shape)
    # Some rows are so small that eps decides about them.
    x = (x * torch.tensor([1.0, 0.1, 1e-3]).view(3, *[1] * weight.dim())).to(dtype)
    shape = list(weight.shape)
    theirs = result_with(module, made, x)
    if not isinstance(theirs, Tensor):
        return math.inf
    with torch.no_grad():
        if site.layer_type == "layer":
            ours = layer_norm(x, shape, weight, made.get("bias"), None, site.eps or 0.0)
        else:
            ours = rms_norm(x, shape, weight, None, site.eps, site.casting)
    if theirs.shape != ours.shape:
        return math.inf
    return float((theirs.double() - ours.double()).abs().mean() / theirs.double().abs().mean())
