"""Lets sparse tensor cores compute the linear layers of which a mask keeps 2 of each 4 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.compiler.method.layer_hook import LayerContext, LayerHook

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.structures import Structure
    from trainc.runtime.mask.zero_mask import ZeroMask


def compute_sparse(to: Lowering, masks: Iterable[ZeroMask], structure: Structure) -> None:
    """Let sparse tensor cores compute linear layers of which masks keep 2 of each 4 weights, where they can.

    The plan says so in the row of the parameter, or why the layer computes with its zeros.
    """
    from trainc.runtime.mask import semi_structured

    if (structure.kind, structure.size) != ("n_m", (2, 4)):
        return
    capability = semi_structured.cuda_capability()
    for mask in masks:
        module, _, weight = mask.name.rpartition(".")
        entry = to.inventory.parameter[mask.name]
        reason = semi_structured.dense_because(to.model.get_submodule(module), capability)
        if weight != "weight" or len(entry.modules) > 1 or entry.aliases:
            reason = "other layers use it, too"
        if reason is None:
            # A mask stays in force between the clause's times.
            to.layer(module, SemiStructured(mask, semi_structured.compress), lasting=True)
        how = f"computed dense ({reason})" if reason else "by sparse tensor cores, in 16 bits"
        mask.text += f", 2:4 {how}"


class SemiStructured(LayerHook):
    """Computes a linear layer with its 2:4 weight compressed, in 16 bits; gradients are those of the dense layer.

    `compress(weight)` gives what `linear` takes in place of a weight. Before the mask is chosen, in other dtypes and on
    other devices than CUDA the layer runs as it is.
    """

    draws: ClassVar[bool] = False
    modules_only: ClassVar[str | None] = (
        "weights of 2:4 sparsity are compressed for sparse tensor cores"
    )

    def __init__(
        self, mask: ZeroMask, compress: Callable[[Tensor], Any], device: str = "cuda"
    ) -> None:
        self.mask, self.compress, self.device = mask, compress, device

    def forward(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        at: LayerContext,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return what the layer gives."""
        from trainc.runtime.mask.semi_structured import reduced_dtype, sparse_linear

        weight: Any = layer.weight
        dtype, alone = reduced_dtype(weight), len(args) == 1 and not kwargs
        here = weight.device.type == self.device
        if dtype is None or not here or self.mask.kept is None or not alone:
            return call(*args, **kwargs)
        bias: Any = layer.bias
        bias = None if bias is None else bias.to(dtype)
        return sparse_linear(args[0].to(dtype), weight.to(dtype), bias, self.compress)
