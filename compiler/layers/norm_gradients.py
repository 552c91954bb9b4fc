"""Norms with per-example gradients, not their norms alone, and norms whose examples are documents inside a row.

The affine part is separate from the normalization, and every example has its own weight and bias: the layer's plus a
probe of zeros. The gradient of that probe is the example's gradient.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.site_state import BoundLayer, SiteState, checked_probe
from trainc.compiler.method.sites import NormSite


class BoundNormGradients(BoundLayer):
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
            f"`{state.name}` sees a tensor of shape {tuple(x.shape)}, but the batch has (rows, tokens) ="
            f" {tuple(index.shape)}: with `example = document` its first two axes must be those. Exclude it from `on`"
        )
    per_token = state.probe[:, column][index]
    return per_token.view(*index.shape, *[1] * (between - 1), *shape)
