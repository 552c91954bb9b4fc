"""Layers that normalize by statistics of the batch, in the mode that they are in now, and others that depend on it."""

from __future__ import annotations

from torch import nn

BatchNormLayer = nn.modules.batchnorm._BatchNorm
"""The base of all BatchNorm layers: of torch, its synchronized one, and those of other libraries."""


def uses_batch_statistics(module: nn.Module) -> bool:
    """Return whether a layer is a BatchNorm that mixes the examples of a batch now.

    That is so in train mode, and in eval mode where it keeps no running statistics.
    """
    if not isinstance(module, BatchNormLayer):
        return False
    return module.training or (module.running_mean is None and module.running_var is None)


def batch_norms(model: nn.Module) -> dict[str, BatchNormLayer]:
    """Return the BatchNorm layers of a model by name, whatever their modes."""
    return {n: module for n, module in model.named_modules() if isinstance(module, BatchNormLayer)}


def notes_on_division(model: nn.Module) -> list[str]:
    """Return what to say where passes of fewer examples give other numbers: nothing without BatchNorm layers."""
    mixing = [name for name, one in batch_norms(model).items() if uses_batch_statistics(one)]
    return [
        f"`{name}` normalizes over the examples of a pass, so its numbers are not those of passes with more examples"
        for name in mixing[:1]
    ]


def calls_once(module: nn.Module) -> bool:
    """Return whether a BatchNorm does what torch's does, and nothing else in its forward pass."""
    own = getattr(module, "unbound", type(module))
    return own.forward is BatchNormLayer.forward


DRAWS = "draws torch's random numbers, in each process others"
NORMALIZES = "normalizes over the part of the batch that its process has"


def depend_on_processes(model: nn.Module) -> dict[str, str]:
    """Return the modules whose numbers depend on how a batch is divided over processes, by name, and why.

    Those that draw are dropout and whatever has a rate of it as an attribute; a forward pass may draw otherwise.
    """
    found = {name: DRAWS for name, module in model.named_modules() if _draws(module)}
    norms = {n: m for n, m in batch_norms(model).items() if not isinstance(m, nn.SyncBatchNorm)}
    return found | dict.fromkeys(norms, NORMALIZES)


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return True
    rates = (value for name, value in vars(module).items() if "drop" in name.lower())
    return any(isinstance(rate, float) and 0 < rate < 1 for rate in rates)
