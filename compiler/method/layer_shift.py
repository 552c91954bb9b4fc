"""Tensors that are added to what a layer gives, others for each micro-batch of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainc.compiler.method.layer_hook import LayerContext, LayerHook

if TYPE_CHECKING:
    from torch import Tensor


class LayerShift(LayerHook):
    """Adds a tensor to the result of a layer, of its shape; nothing where none is set.

    A micro-batch is known by the number of its first example in the step. While it watches, what it adds is a leaf to
    differentiate by.
    """

    draws = False
    zero_is_identity = True
    modules_only = "what is added to the outputs of layers, other tensors for each micro-batch, needs bound modules"

    def __init__(self) -> None:
        self._shifts: dict[int, Tensor] = {}
        self._order: list[int] = []
        self._leaves: dict[str, Tensor] | None = None
        self._name = ""

    def watch(self, name: str, leaves: dict[str, Tensor] | None, first_example: int = 0) -> None:
        """Put what the next pass adds into `leaves`, under a name; None: the passes are the step's own again."""
        self._name, self._leaves = name, leaves
        if leaves is not None and first_example not in self._order:
            self._order.append(first_example)

    def set(self, shifts: Sequence[Tensor]) -> None:
        """Add these from now on, one for each micro-batch that was watched, in their order."""
        self._shifts = dict(zip(self._order, shifts, strict=True))

    def clear(self) -> None:
        """Add nothing any more."""
        self._shifts, self._order, self._leaves = {}, [], None

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Return the result with what is added."""
        import torch

        if not (self._order or self._shifts):
            return y
        assert at.first_example is not None
        shift = self._shifts.get(int(at.first_example))
        if self._leaves is None:
            return y if shift is None else y + shift
        if self._name in self._leaves:
            raise at.error(
                f"`{at.name}` runs more than once in a pass, and what is added to it must be one tensor"
            )
        if at.rows is not None and (not y.dim() or y.shape[0] != at.rows):
            raise at.error(
                f"`{at.name}` gives an output of shape {list(y.shape)}, and what is added needs the {at.rows} rows of"
                " the batch on the first axis: leave the layer out of the selection"
            )
        if not y.is_floating_point():
            raise at.error(
                f"`{at.name}` gives no numbers of floating point, so there is no gradient to move it along"
            )
        leaf = torch.zeros_like(y) if shift is None else shift.detach().clone()
        self._leaves[self._name] = leaf.requires_grad_()
        return y + leaf
