"""A function of a weight that a layer computes with in its place: what a construct gives to `Lowering.weight`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.compiler.method.layer_hook import LayerContext, LayerHook

if TYPE_CHECKING:
    from torch import Tensor, nn


class WeightHook(LayerHook):
    """What a layer computes with in place of one of its parameters: override `change_weight`.

    The stored parameter is never written to. Its gradient is that of what `change_weight` returns, by autograd, so the
    parameter has a gradient in its own entries, and so have parameters of the model that the result depends on. Layers
    that share the parameter are changed alike, and every call of a layer in a step has the same random numbers:
    micro-batches, replicas, a checkpoint's second pass and the second pass of SAM. Evaluation has the plain weight.
    """

    of_untrained: ClassVar[bool] = True
    """Whether entries that a mask does not train are changed, too; else they keep their values."""
    for_weight: ClassVar[bool] = True

    @abstractmethod
    def change_weight(self, weight: Tensor, at: LayerContext) -> Tensor:
        """Return what the layer computes with, in the shape of the weight; it is cast to the weight's dtype.

        `at.index` numbers the parameter among those with random numbers, `at.name` is its name in the model.
        """

    def random(self, weight: Tensor, at: LayerContext, distribution: str) -> Tensor:
        """Return random numbers in the shape of the weight, the same in the whole step; float32 at least."""
        from trainc.kernels.noise.random_entries import random_entries

        return random_entries(weight, at.key, at.index, distribution)

    def forward(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        at: LayerContext,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the layer with the changed weight."""
        stored: Tensor = getattr(layer, at.weight)
        at.layer = layer
        changed = self.change_weight(stored, at)
        trained = at.scalars.get(TRAINED)
        if trained is not None:
            changed = changed.where(trained, stored)
        with instead(layer, at.weight, changed.to(stored.dtype)):
            return call(*args, **kwargs)

    @property
    def replaces(self) -> bool:
        """Return False: the layer's own forward pass runs."""
        return False


TRAINED = "trained entries"
"""The name among the numbers of a hook of where a mask lets the parameter train, bool in its shape."""


@contextmanager
def instead(layer: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Inside this block, give a tensor to who reads a parameter of a layer by its attribute; its tables keep theirs.

    Recurrent layers read their parameters from a list of their own.
    """
    attributes = vars(layer)
    flat, names = attributes.get("_flat_weights"), attributes.get("_flat_weights_names", ())
    before = attributes.get(name)
    attributes[name] = tensor
    if flat is not None and name in names:
        at = names.index(name)
        attributes["_flat_weights"] = [*flat[:at], tensor, *flat[at + 1 :]]
    try:
        yield
    finally:
        if flat is not None:
            attributes["_flat_weights"] = flat
        if before is None:
            del attributes[name]
        else:
            attributes[name] = before
