"""Evaluate loss terms over parameters, and check that they use only their argument's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Penalty = Callable[[Mapping[str, Tensor]], Tensor]


class Values(Mapping[str, Tensor]):
    """The argument of a penalty: every parameter by each of its names, and the scalars by name."""

    def __init__(self, tensors: Mapping[str, Tensor], canonical: Mapping[str, str]) -> None:
        self._tensors, self._canonical = tensors, canonical

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._canonical.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Watch(TorchFunctionMode):
    """Raises ValueError where a penalty uses a trained tensor that is not from its argument."""

    def __init__(self, penalty: str, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.penalty, self.owners = penalty, owners

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not is_fake(leaf):
                name = self.owners.get(id(leaf), "a tensor that requires grad")
                raise ValueError(
                    f"the penalty `{self.penalty}` uses `{name}` directly, so no gradient would reach it: take it"
                    " from the argument of the penalty"
                )
        return func(*args, **(kwargs or {}))


def evaluate(
    name: str, penalty: Penalty, values: Mapping[str, Tensor], owners: Mapping[int, str]
) -> Tensor:
    """Return a penalty's value; `owners` are the names of the user's tensors, by `id`."""
    with _Watch(name, owners):
        value = penalty(values)
    if value.dim() != 0:
        raise ValueError(
            f"the penalty `{name}` must return a 0-d tensor, but returned shape {list(value.shape)}"
        )
    return value
