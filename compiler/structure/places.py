"""Where the parts of a model stand: the place of every module and parameter between input and head.

What a part is comes first, its number second. Embeddings, and what is registered before the first block, are the
input; the head, and what is registered after the last block, is the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from trainc.compiler.structure.blocks import parallel_list
from trainc.compiler.structure.level_groups import grouped_levels
from trainc.compiler.structure.roles import EMBEDDING, HEAD, looks_like_input, own_parameters


@dataclass(frozen=True, slots=True)
class Place:
    """The index of a block, the number of blocks, and the level for layer-wise decay.

    `depth` is 0 at the input and 1 at the head. `level` counts embeddings as 0, blocks from 1, the head as `levels`.
    """

    block: int
    blocks: int
    level: int
    levels: int

    @property
    def depth(self) -> float:
        return self.block / (self.blocks - 1) if self.blocks > 1 else 0.0

    @property
    def inner_level(self) -> int | None:
        """Return the level of a part of a block; None for what is before the first or after the last."""
        return self.level if 0 < self.level < self.levels else None


def lowest(places: Iterable[Place]) -> Place:
    """Return the place nearest to the input: the first of those with the lowest level."""
    return min(places, key=lambda place: place.level)


def enclosing(name: str) -> Iterator[str]:
    """Yield a dotted name and the names around it, the longest first, without the empty one."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def find_places(
    model: nn.Module, blocks: tuple[str, ...], roles: Mapping[str, set[str]]
) -> dict[str, Place]:
    """Return the place of every module and parameter of `model` under each of its names.

    `roles` are those of modules and parameters. A model that says how its layers are grouped (`group_matcher`) is
    taken at its word. Without blocks, every layer that holds parameters counts as one.
    """
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    tensors = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if (levels := grouped_levels(model, roles)) is not None:
        top = max(levels.values())
        found = {n: Place(max(k - 1, 0), max(top, 1), k, top) for n, k in levels.items()}
        return _with_modules(names, tensors, found)
    if blocks:
        return _places_by_blocks(names, tensors, blocks, roles)
    return _places_by_layers(model, names, tensors, roles)


def _with_modules(
    names: list[str], tensors: list[str], found: dict[str, Place]
) -> dict[str, Place]:
    """Add the places of modules to those of parameters: the place of the first parameter in each, or else the last."""
    first: dict[str, Place] = {}
    for tensor in tensors:
        for around in enclosing(tensor.rpartition(".")[0]):
            first.setdefault(around, found[tensor])
    last = first[""] = found[tensors[0]]
    for name in names:
        last = first.setdefault(name, last)
    return {**first, **found}


def _places_by_blocks(
    names: list[str], tensors: list[str], blocks: tuple[str, ...], roles: Mapping[str, set[str]]
) -> dict[str, Place]:
    index = {block: i for i, block in enumerate(blocks)}
    inside = {n: next((index[a] for a in enclosing(n) if a in index), None) for n in names}
    position = {name: i for i, name in enumerate(names)}
    last_block = max(i for i, name in enumerate(names) if inside[name] is not None)
    owners = {tensor.rpartition(".")[0] for tensor in tensors}
    has_head = any(
        inside[n] is None and (position[n] > last_block or HEAD in roles[n]) for n in owners
    )
    count, levels = len(blocks) + has_head, len(blocks) + 1
    start, end = Place(0, count, 0, levels), Place(count - 1, count, levels, levels)
    at = [Place(i, count, i + 1, levels) for i in range(len(blocks))]
    found: dict[str, Place] = {}
    latest = -1
    for i, name in enumerate(names):
        block = inside[name]
        if block is not None:
            latest = max(latest, block)
            found[name] = at[block]
        elif HEAD in roles[name]:
            found[name] = end
        elif latest < 0 or EMBEDDING in roles[name] or any(map(looks_like_input, name.split("."))):
            found[name] = start
        elif i > last_block:
            found[name] = end
        else:
            found[name] = at[latest + _belongs_to_next(name, blocks[latest : latest + 2])]
    for tensor in tensors:
        owner = tensor.rpartition(".")[0]
        around = [i for block, i in index.items() if block.startswith(f"{owner}." if owner else "")]
        place = found[owner]
        if inside[owner] is None and EMBEDDING in roles[tensor]:
            place = start
        elif inside[owner] is None and around and HEAD not in roles[owner]:
            place = end if max(around) == len(blocks) - 1 and has_head else at[max(around)]
        found[tensor] = place
    return found


def _belongs_to_next(name: str, neighbours: tuple[str, ...]) -> int:
    """Say (0 or 1) whether what stands between two blocks belongs to the second, as a change of size before it does."""
    if len(neighbours) < 2:
        return 0
    before, after = (_shared(name, other) for other in neighbours)
    return int(after > before or (after == before > 0 and name.split(".")[before].isdigit()))


def _shared(a: str, b: str) -> int:
    """Return how many leading segments two names share."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next(
        (i for i, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1
    )


def _layer(name: str) -> str:
    """Return the name of the layer that a module belongs to, as parametrizations do, or of the experts it is among."""
    whole = re.split(r"\.(?:parametrizations|base_layer|lora_\w+)\.", f"{name}.")[0].rstrip(".")
    return parallel_list(whole)


def _places_by_layers(
    model: nn.Module, names: list[str], tensors: list[str], roles: Mapping[str, set[str]]
) -> dict[str, Place]:
    """Return places where every layer is a block, all embeddings together are the first, and the head is the last."""
    named = model.named_modules(remove_duplicate=False)
    layers = list(dict.fromkeys(_layer(n) for n, m in named if own_parameters(m)))
    ends = [n for n in layers if HEAD in roles[n]]
    inputs = [n for n in layers if EMBEDDING in roles[n] and n not in ends]
    middle = [n for n in layers if n not in ends and n not in inputs]
    level = dict.fromkeys(inputs, 0)
    level |= {n: i for i, n in enumerate(middle, bool(inputs))}
    count = len(middle) + bool(inputs)
    level |= dict.fromkeys(ends, count)
    count = max(count + bool(ends), 1)
    found, current = {}, 0
    for name in names:
        current = level.get(name, current)
        found[name] = Place(current, count, current, count - 1)
    for tensor in tensors:
        first = EMBEDDING in roles[tensor] and tensor.rpartition(".")[0] not in ends
        found[tensor] = Place(0, count, 0, count - 1) if first else found[tensor.rpartition(".")[0]]
    return found
