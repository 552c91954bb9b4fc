"""The blocks of a model: items of numbered lists that consist of layers themselves, as in `blocks.3`.

The items of a list of lists, as in `stages.1.blocks.0`, count one by one. Numbers inside a block, such as those of its
layers or its experts, make no blocks, nor do those in a head or in what computes the input.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn

from trainc.compiler.structure.roles import (
    holds_parameters,
    looks_like_end,
    looks_like_input,
    own_class,
)

_PARALLEL = ("expert", "head", "branch", "adapter")
"""Parts of the names of lists whose items run beside each other."""

Named = tuple[str, nn.Module]


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's blocks in registration order; empty for a model without any.

    Where no list of blocks is found, names such as `block1` count as numbers; where this finds none either, single
    layers in a list are blocks, and at last lists in what is named like a head or an input.
    """
    return (
        _search(model, False, False)
        or _search(model, True, False)
        or _layers_in_a_list(model)
        or _search(model, False, True)
        or _search(model, True, True)
    )


def _search(model: nn.Module, by_words: bool, everywhere: bool) -> tuple[str, ...]:
    finder = _BlockFinder(by_words, everywhere)
    finder.search("", model)
    return finder.blocks()


def _layers_in_a_list(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers in the longest numbered list, if something with parameters follows it."""
    best: tuple[str, ...] = ()
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(looks_like_end(part) or looks_like_input(part) or _beside(part) for part in parts):
            continue
        numbered = ((k, c) for k, c in _children(module) if k.isdigit() and holds_parameters(c))
        layers = tuple(f"{name}.{key}" for key, _ in numbered if name)
        best = max(best, layers, key=len)
    owners = [n.rpartition(".")[0] for n, _ in model.named_parameters()]
    last = max((i for i, owner in enumerate(owners) if owner in best), default=len(owners))
    named = any(looks_like_end(owner.split(".")[0]) for owner in owners)
    return best if len(best) > 1 and (named or last + 1 < len(owners)) else ()


class _BlockFinder:
    """Searches a module tree for lists of blocks."""

    def __init__(self, by_words: bool, everywhere: bool) -> None:
        self.by_words, self.everywhere = by_words, everywhere
        self.lists: list[tuple[bool, list[str]]] = []
        """For each list whether its items are plain containers, and the names of its blocks."""

    def blocks(self) -> tuple[str, ...]:
        """Return the names that were found: plain containers only where nothing else is a block."""
        proper = [names for plain, names in self.lists if not plain]
        longer = [names for _, names in self.lists if len(names) > 1]
        return tuple(name for names in proper or longer for name in names)

    def search(self, name: str, module: nn.Module) -> None:
        """Find lists in `module` and below it, but not below a list."""
        items = self._items(name, module)
        if self.by_words and not _alike([m for _, m in items]):
            items = []
        # A list of one is a stack of one block; a sequence of one may be a wrapper.
        stack = isinstance(module, nn.ModuleList) and len(items) == 1
        if items and (stack or not self._is_pipeline(items)):
            plain, names = self._list(items)
            # One block among single layers is rather a part of a stem or a head.
            among = isinstance(module, nn.Sequential) and len(items) == 1
            alone = sum(holds_parameters(child) for _, child in _children(module)) == 1
            self.lists.append((plain or (among and not alone), names))
            return
        for key, child in _children(module):
            end = looks_like_end(key) or looks_like_input(key)
            parallel = _beside(key) and self._items("", child)
            if not parallel and (self.everywhere or not end):
                self.search(f"{name}.{key}".lstrip("."), child)

    def _list(self, items: list[Named]) -> tuple[bool, list[str]]:
        """Return whether the items of a list are plain containers, and the names of its blocks."""
        stages = [self._stage(n, m) for n, m in items]
        if sum(map(bool, stages)) * 2 >= len(items):
            # What else is in the list changes sizes between the stages.
            return False, [block for stage in stages for block in stage]
        modules = [m for _, m in items]
        alike = _alike(modules)
        layers = [sum(holds_parameters(part, False) for part in m.modules()) for m in modules]
        chosen = list(range(len(items)))
        while alike and chosen[0] < alike[0] and layers[chosen[0]] <= 2 < layers[alike[0]]:
            chosen.pop(0)  # computes the input
        while alike and chosen[-1] > alike[-1] and layers[chosen[-1]] <= 2 < layers[alike[0]]:
            chosen.pop()  # a layer before the head
        plain = all(_is_plain(modules[i]) for i in chosen)
        return plain, [block for i in chosen for block in (stages[i] or [items[i][0]])]

    def _items(self, name: str, module: nn.Module) -> list[Named]:
        """Return the numbered children that consist of layers."""
        return [
            (f"{name}.{key}".lstrip("."), child)
            for key, child in _children(module)
            if (key.isdigit() or (self.by_words and key[-1:].isdigit())) and _is_composite(child)
        ]

    def _is_pipeline(self, items: list[Named]) -> bool:
        """Say whether the items are the parts of a model, such as backbone and head, of which one has blocks."""
        if _alike([m for _, m in items]):
            return False
        inner = _BlockFinder(self.by_words, self.everywhere)
        for name, module in items:
            inner.search(name, module)
        return any(len(names) > 1 for plain, names in inner.lists if not plain)

    def _stage(self, name: str, module: nn.Module) -> list[str]:
        """Return the blocks in an item that is a list of blocks with at most a change of size; none otherwise."""
        where, holder, rest = name, module, list[nn.Module]()
        if not self._items(name, module):
            lists = [(k, c) for k, c in _children(module) if self._items("", c)]
            if len(lists) != 1 or _beside(lists[0][0]):
                return []
            where, holder = f"{name}.{lists[0][0]}", lists[0][1]
            rest = [c for k, c in _children(module) if k != lists[0][0] and _has_matrices(c)]
        inner = self._items(where, holder)
        modules = [m for _, m in inner]
        layers = [c for _, c in _children(holder) if holds_parameters(c) and not _is_composite(c)]
        chains = [_is_sequence(m) or (holder is not module and _is_convolution(m)) for m in modules]
        if layers or all(chains):
            return []
        fewest = len(inner) if holder is not module else len(inner) // 2 + 1
        if len(inner) > 1 and len(_alike(modules)) < fewest:
            return []
        if len(rest) > 1 or sum(map(_size, rest)) > sum(map(_size, modules)):
            return []
        return [b for n, m in inner for b in (self._stage(n, m) if _is_plain(m) else []) or [n]]


def _beside(segment: str) -> bool:
    """Say whether a segment of a name is that of a list whose items run beside each other."""
    return any(word in segment.lower() for word in _PARALLEL)


def parallel_list(name: str) -> str:
    """Return the name of the list whose items run beside each other that a module is in, or else its own name."""
    parts = name.split(".")
    for i, (segment, number) in enumerate(pairwise(parts)):
        if _beside(segment) and number.isdigit():
            return ".".join(parts[: i + 1])
    return name


def _children(module: nn.Module) -> list[Named]:
    return [(key, child) for key, child in module._modules.items() if child is not None]


def _is_composite(module: nn.Module) -> bool:
    """Say whether a module has layers in it; one with an adapter or a parametrization is a layer."""
    if {"base_layer", "parametrizations"} & module._modules.keys():
        return False
    return any(holds_parameters(child) for _, child in _children(module))


def _is_plain(module: nn.Module) -> bool:
    return own_class(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_sequence(module: nn.Module) -> bool:
    """Say whether a module is a sequence of single layers."""
    return isinstance(module, nn.Sequential) and not any(_is_composite(c) for c in module)


def _is_convolution(module: nn.Module) -> bool:
    """Say whether a module is one convolution, perhaps with its norm."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return len(matrices) == 1 and matrices[0].dim() > 2


def _has_matrices(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _alike(modules: list[nn.Module]) -> list[int]:
    """Return the indices of the modules of the most frequent class, where two neighbours are built of the same classes.

    They are if the classes in one are all in the other: a residual block with a projection is like one without, but
    attention in a wrapper is not like an MLP in the same wrapper. No index is returned for a class that occurs once.
    """
    kinds = Counter(map(own_class, modules)).most_common(1)
    same = [i for i, m in enumerate(modules) if own_class(m) is kinds[0][0]]
    inside = [
        {own_class(part) for part in modules[i].modules() if holds_parameters(part)} for i in same
    ]
    near = [a <= b or b <= a for a, b in pairwise(inside)]
    return same if any(near) else []
