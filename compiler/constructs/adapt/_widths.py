"""How wide the inputs and outputs of a module are, as its layers say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.model.inventory import Inventory, ModuleEntry

_CHANNELS_FIRST = ("BatchNorm", "GroupNorm", "InstanceNorm", "Conv1d", "Conv2d", "Conv3d")
"""The beginnings of class names of layers whose channels are not on the last axis."""


def widths_of(
    entry: ModuleEntry, inventory: Inventory, width: int | None = None
) -> tuple[int, int] | None:
    """Return the numbers of channels of a module's first input and of its output; None where they cannot be told.

    A module around several layers gives as many as it takes: `width`, or else what its first layer takes.
    """
    if (own := _of_layer(entry, inventory)) is not None:
        return own
    if width is not None:
        return width, width
    prefix = f"{entry.name}." if entry.name else ""
    for inner in inventory.modules:
        if inner.name.startswith(prefix) and inner.name != entry.name:
            if any(name.startswith(_CHANNELS_FIRST) for name in inner.types):
                return None
            if (found := _of_layer(inner, inventory)) is not None:
                return found[0], found[0]
    return None


def is_one_layer(entry: ModuleEntry, inventory: Inventory) -> bool:
    """Say whether a module is a linear layer or a norm, which computes each token by itself."""
    attends = any(name.rpartition(".")[2] == "in_proj_weight" for name in entry.parameters)
    return not attends and _of_layer(entry, inventory) is not None


def _of_layer(entry: ModuleEntry, inventory: Inventory) -> tuple[int, int] | None:
    """Return the widths of a linear layer, a norm, or torch's attention; None for another module."""
    own = {name.rpartition(".")[2]: inventory.parameter[name] for name in entry.parameters}
    if (fused := own.get("in_proj_weight")) is not None:
        return fused.shape[1], fused.shape[1]
    weight = own.get("weight")
    if weight is None or not weight.dtype.startswith(("float", "bfloat")):
        return None
    if weight.ndim == 1 and "norm" in entry.roles:
        return weight.shape[0], weight.shape[0]
    if weight.ndim == 2 and "Linear" in entry.types:
        return weight.shape[1], weight.shape[0]
    return (weight.shape[0], weight.shape[1]) if "Conv1D" in entry.types else None


def width_problems(bound: Targets, width: int | None) -> Iterator[Problem]:
    """Yield a problem for each selected module without a known width, and for a `width` that is not the layer's."""
    for entry in bound.modules:
        own = _of_layer(entry, bound.inventory)
        if entry.is_never_called:
            yield Problem(
                "wrong-target-kind",
                f"`{entry.name}` is never called: nn.MultiheadAttention uses its weight directly",
                help="select the attention around it",
            )
        elif widths_of(entry, bound.inventory, width) is None:
            yield Problem(
                "wrong-target-kind",
                f"`{entry.name}` ({entry.types[0]}) has no linear layer and no norm that says how many channels the"
                " last axis of its input has",
                help="select another module, or write the number of channels, such as `width = 768`",
            )
        elif width is not None and own is not None and own[0] != width:
            yield Problem(
                "bad-value",
                f"`{entry.name}` takes {own[0]} channels, not {width}",
                field="width",
                help="remove `width`",
            )


def first_tensor(inputs: tuple[object, ...]) -> Tensor | None:
    """Return what a layer was given first, if that is a tensor of floating-point numbers."""
    import torch

    x = inputs[0] if inputs else None
    return x if isinstance(x, torch.Tensor) and x.is_floating_point() else None
