"""BatchNorm over groups of examples: it mixes only the examples of a group, so that groups can be compared."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import NotMeasurable, SiteError
from trainc.compiler.layers.layer import own_names
from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.batch_norm.ghost_batch_norm import ghost_batch_norm


class BoundGhostBatchNorm(BoundLayer):
    """Normalizes every group by its own statistics; where it is measured, each group has its own weight and bias."""

    def run_operator(self, x: Tensor) -> Tensor:
        own, state = cast(nn.BatchNorm2d, self), self.trainc
        size = state.example_index.rows
        if own.momentum is None:
            raise SiteError(
                f"`{state.name}` averages its statistics over all batches (momentum=None), which is not supported for"
                " groups of examples: set `momentum` of the layer to a number"
            )
        weight, bias = (own.weight, own.bias) if state.measured is None else (None, None)
        mean, var = own.running_mean, own.running_var
        y = ghost_batch_norm(x, mean, var, weight, bias, size, True, own.momentum, own.eps)
        if own.num_batches_tracked is not None:
            own.num_batches_tracked.add_(x.shape[0] // size)
        if state.measured is None:
            return y
        assert state.probe is not None
        gain, shift = (state.probe[:, i].repeat_interleave(size, 0) for i in (0, 1))
        shape = (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = y.to(dtype) * (own.weight + gain).view(shape) + (own.bias + shift).view(shape)
        return y.to(x.dtype)


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the layers that normalize over the batch."""
    base = nn.modules.batchnorm._BatchNorm
    return [name for name, module in model.named_modules() if isinstance(module, base)]


def ghost_site(name: str, module: nn.Module) -> LayerSite:
    """Return the site of an affine BatchNorm; raises NotMeasurable for one without weights, or across replicas."""
    own = own_names(name, module)
    if isinstance(module, nn.SyncBatchNorm) or not own:
        raise NotMeasurable(
            f"`{name}` ({type(module).__name__}) cannot be measured: it has no weight, or it mixes examples of several"
            " replicas. Exclude the layer from `on`"
        )
    return LayerSite(name, "batch_norm", own["weight"], own["bias"])
