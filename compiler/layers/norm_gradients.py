"""Norms whose per-example gradients are wanted themselves, or whose examples are documents inside a row.

The affine part is applied apart from the normalization, with a weight and a bias of every example's own: the layer's
plus a probe of zeros, whose gradient then is the example's contribution.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.site_state import Bound, SiteState, checked_probe
from trainc.compiler.method.sites import NormSite


class BoundWideNorm(Bound):
    def forward(self, x: Tensor) -> Tensor:
        if not self.reaches_operator():
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        site = cast(NormSite, self.trainc.measured)
        weight = cast(Tensor, self.weight)  # type: ignore[attr-defined]
        bias = cast("Tensor | None", getattr(self, "bias", None))
        shape = list(weight.shape)
        if site.form == "layer":
            normal = functional.layer_norm(x, shape, None, None, cast(nn.LayerNorm, self).eps)
        else:
            normal = functional.rms_norm(x, shape, None, site.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        gain = weight.to(wide) + _of_example(self.trainc, 0, x, shape)
        if site.casting == "gemma":
            gain = gain + 1
        y = normal.to(wide) * gain
        if bias is not None:
            y = y + bias.to(wide) + _of_example(self.trainc, 1, x, shape)
        return y.to(normal.dtype)


def _of_example(armed: SiteState, column: int, x: Tensor, shape: list[int]) -> Tensor:
    """Return one parameter's probe spread over x: every position gets the entries of the example it belongs to."""
    assert armed.probe is not None
    between = x.dim() - len(shape) - 1
    index = armed.division.index
    if index is None:
        probe = checked_probe(armed, x)
        return probe[:, column].view(probe.shape[0], *[1] * between, *shape)
    if x.shape[:2] != index.shape:
        raise SiteError(
            f"`{armed.name}` sees a tensor of shape {tuple(x.shape)}, and the documents are told apart by"
            f" (rows, tokens) = {tuple(index.shape)}: its first two axes are not those"
        )
    spread = armed.probe[:, column][index]
    return spread.view(*index.shape, *[1] * (between - 1), *shape)
