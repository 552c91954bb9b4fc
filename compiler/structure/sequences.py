"""An nn.Sequential with children that are none of its items: it runs, counts and gives its items alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from torch import nn

BESIDE_ITEMS = "beside_items"
"""The attribute of a class whose modules are no items of a sequence that they are children of."""


class _Items:
    """Base of the classes that `keep_items` makes; `own_class` is the one that the sequence had before."""

    own_class: type[nn.Module]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(_items(self).values())

    def __len__(self) -> int:
        return len(_items(self))

    def __getitem__(self, index: Any) -> Any:
        items = _items(self)
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*items.items()][index]))
        return [*items.values()][index]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.own_class,), *reduced[2:]


def keep_items(module: nn.Module) -> None:
    """Let a module that is an nn.Sequential have children beside its items, as a subclass of itself."""
    if isinstance(module, nn.Sequential) and not isinstance(module, _Items):
        object.__setattr__(module, "__class__", _subclass(cast("Any", type(module))))


def has_items_alone(module: nn.Module) -> None:
    """Give a sequence that has no child beside its items its own class back, unless a program has changed it since."""
    own = vars(type(module)).get("own_class")
    if own is not None and len(_items(module)) == len(module._modules):
        object.__setattr__(module, "__class__", own)


def _items(module: Any) -> dict[str, nn.Module]:
    children: dict[str, nn.Module] = module._modules
    return {name: one for name, one in children.items() if not getattr(one, BESIDE_ITEMS, False)}


@cache
def _subclass(own: type[nn.Module]) -> Any:
    return type(own.__name__, (_Items, own), {"own_class": own, "__module__": own.__module__})


def _new(own: type[nn.Module]) -> Any:
    """Return a sequence without attributes, as pickle makes it of its own class."""
    kind = _subclass(cast("Any", own))
    return kind.__new__(kind)
