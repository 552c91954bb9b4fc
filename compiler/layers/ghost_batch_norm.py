"""BatchNorm over groups of examples: what mixes the examples of a group only, so that groups can be compared."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import NotMeasurable, SiteError
from trainc.compiler.layers.registry import own_names
from trainc.compiler.layers.site_state import Bound
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.norm.ghost_batch_norm import ghost_batch_norm


class BoundGhostBatchNorm(Bound):
    """Normalizes every group by its own statistics; measured, it has an affine part of each group's own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.reaches_operator():
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        own, armed = cast(nn.BatchNorm2d, self), self.trainc
        size = armed.division.rows
        if own.momentum is None:
            raise SiteError(
                f"`{armed.name}` averages its statistics over all batches (momentum=None), which groups cannot"
                " reproduce: give it a momentum"
            )
        weight, bias = (own.weight, own.bias) if armed.measured is None else (None, None)
        mean, var = own.running_mean, own.running_var
        y = ghost_batch_norm(x, mean, var, weight, bias, size, True, own.momentum, own.eps)
        if own.num_batches_tracked is not None:
            own.num_batches_tracked.add_(x.shape[0] // size)
        if armed.measured is None:
            return y
        assert armed.probe is not None
        gain, shift = (armed.probe[:, i].repeat_interleave(size, 0) for i in (0, 1))
        shape = (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
        wide = torch.promote_types(x.dtype, torch.float32)
        y = y.to(wide) * (own.weight + gain).view(shape) + (own.bias + shift).view(shape)
        return y.to(x.dtype)


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the layers that normalize over the batch."""
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def ghost_site(name: str, module: nn.Module) -> LayerSite:
    """Return the site of an affine BatchNorm; raises NotMeasurable for one without weights, or across replicas."""
    own = own_names(name, module)
    if isinstance(module, nn.SyncBatchNorm) or not own:
        raise NotMeasurable(
            f"`{name}` ({type(module).__name__}) has no weights, or mixes examples of several replicas"
        )
    return LayerSite(name, "batch_norm", own["weight"], own["bias"])
