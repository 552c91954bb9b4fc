"""The inventory of a model: every module and parameter with its depth and roles, as plain data.

Taken once, on the meta device or on real weights; selectors are decided on it, before any wrapping or sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NORM, BIAS, EMBEDDING, ATTENTION, MLP, HEAD = (
    "norm",
    "bias",
    "embedding",
    "attention",
    "mlp",
    "head",
)
ROLES = (NORM, BIAS, EMBEDDING, ATTENTION, MLP, HEAD)

_ATTENTION_SEGMENTS = {"attn", "attention", "self_attn", "self_attention", "cross_attn", "mha"}
_MLP_SEGMENTS = {
    "mlp",
    "ffn",
    "ff",
    "feed_forward",
    "feedforward",
    "linear1",
    "linear2",
    "intermediate",
}
_EMBEDDING_SEGMENTS = {
    "embed",
    "embeddings",
    "embedding",
    "wte",
    "wpe",
    "embed_tokens",
    "pos_embed",
}
_HEAD_SEGMENTS = {"head", "lm_head", "classifier", "score", "fc_out", "output_head"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where something sits: its block's index, the number of blocks, and its level for layer-wise decay.

    `depth` is 0 at the input and 1 at the head. `level` counts embeddings as 0, blocks from 1, the head as `levels`.
    """

    block: int
    blocks: int
    level: int
    levels: int

    @property
    def depth(self) -> float:
        return self.block / (self.blocks - 1) if self.blocks > 1 else 0.0


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """A module: dotted name, class names from its own up, place, roles and its direct parameters' names."""

    name: str
    types: tuple[str, ...]
    place: Place
    roles: frozenset[str]
    parameters: tuple[str, ...]
    numel: int
    ndim: int
    trainable: bool


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """A parameter under its first name; `aliases` are the other names of the same tensor (tied weights)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    module: str
    types: tuple[str, ...]
    place: Place
    roles: frozenset[str]
    trainable: bool
    aliases: tuple[str, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Inventory:
    """All modules and parameters of one model, in registration order."""

    model: str
    modules: tuple[ModuleEntry, ...]
    parameters: tuple[ParameterEntry, ...]

    @cached_property
    def module(self) -> dict[str, ModuleEntry]:
        return {m.name: m for m in self.modules}

    @cached_property
    def parameter(self) -> dict[str, ParameterEntry]:
        """Return parameters by every name they have."""
        return {name: p for p in self.parameters for name in (p.name, *p.aliases)}

    @property
    def trainable(self) -> tuple[ParameterEntry, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    @cached_property
    def signature(self) -> list[list[object]]:
        """Return names, shapes and dtypes: what a saved program checks before it binds to a model."""
        return [[p.name, list(p.shape), p.dtype] for p in self.parameters]


def take(model: nn.Module) -> Inventory:
    """Return the inventory of `model`; no weight is read."""
    places = _places(model)
    roles = {name: _module_roles(name, module) for name, module in model.named_modules()}
    last = _last_linear(model)
    if last is not None and not any(HEAD in found for found in roles.values()):
        roles[last] |= {HEAD}
    modules = tuple(
        _module_entry(n, m, places[n], frozenset(roles[n])) for n, m in model.named_modules()
    )
    by_name = {m.name: m for m in modules}
    return Inventory(type(model).__name__, modules, tuple(_parameters(model, by_name)))


def type_names(module: object) -> tuple[str, ...]:
    """Return the class names of `module`, from its own class up to but without nn.Module."""
    return tuple(
        dict.fromkeys(
            c.__name__ for c in type(module).__mro__ if c.__name__ not in ("Module", "object")
        )
    )


def _module_entry(name: str, module: nn.Module, place: Place, roles: frozenset[str]) -> ModuleEntry:
    direct = list(module.named_parameters(name, recurse=False))
    weight = getattr(module, "weight", None)
    return ModuleEntry(
        name=name,
        types=type_names(module),
        place=place,
        roles=roles,
        parameters=tuple(n for n, _ in direct),
        numel=sum(p.numel() for _, p in direct),
        ndim=weight.dim() if weight is not None and hasattr(weight, "dim") else 0,
        trainable=any(p.requires_grad for _, p in direct),
    )


def _parameters(model: nn.Module, modules: dict[str, ModuleEntry]) -> Iterator[ParameterEntry]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        leaf = name.rpartition(".")[2]
        yield ParameterEntry(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            bytes=parameter.numel() * parameter.element_size(),
            module=owner.name,
            types=owner.types,
            place=owner.place,
            roles=owner.roles | ({BIAS} if leaf.endswith("bias") else set()) | _segment_roles(leaf),
            trainable=parameter.requires_grad,
            aliases=tuple(n for n in names[id(parameter)] if n != name),
        )


def _segment_roles(name: str) -> set[str]:
    segments = set(name.lower().split("."))
    found = set()
    if segments & _ATTENTION_SEGMENTS:
        found.add(ATTENTION)
    if segments & _MLP_SEGMENTS:
        found.add(MLP)
    if segments & _EMBEDDING_SEGMENTS:
        found.add(EMBEDDING)
    if segments & _HEAD_SEGMENTS:
        found.add(HEAD)
    return found


def _module_roles(name: str, module: nn.Module) -> set[str]:
    found = _segment_roles(name)
    types = type_names(module)
    if any("norm" in t.lower() for t in types) and not list(module.children()):
        found.add(NORM)
    if "Embedding" in types:
        found.add(EMBEDDING)
    return found


def _last_linear(model: nn.Module) -> str | None:
    linear = [name for name, module in model.named_modules() if "Linear" in type_names(module)]
    return linear[-1] if linear else None


def _block_name(name: str) -> str | None:
    """Return the name up to and with its first number (`blocks.3` of `blocks.3.mlp`), or None without one."""
    segments = name.split(".")
    for i, segment in enumerate(segments):
        if segment.isdigit():
            return ".".join(segments[: i + 1])
    return None


def _places(model: nn.Module) -> dict[str, Place]:
    """Number the blocks in registration order; what follows the last block is the head, one further.

    Without at least two numbered blocks every leaf layer that owns parameters is a block of its own.
    """
    names = [name for name, _ in model.named_modules()]
    numbered = list(dict.fromkeys(b for name in names if (b := _block_name(name)) is not None))
    if len(numbered) >= 2:
        return _places_by_blocks(names, numbered)
    leaves = [
        n
        for n, m in model.named_modules()
        if next(iter(m.parameters(recurse=False)), None) is not None
    ]
    count = max(len(leaves), 1)
    places, current = {}, 0
    for name in names:
        if name in leaves:
            current = leaves.index(name)
        places[name] = Place(current, count, current, max(count - 1, 0))
    return places


def _places_by_blocks(names: list[str], numbered: list[str]) -> dict[str, Place]:
    index = {block: i for i, block in enumerate(numbered)}
    last_block = max(i for i, name in enumerate(names) if _block_name(name) is not None)
    has_head = last_block + 1 < len(names)
    count = len(numbered) + (1 if has_head else 0)
    levels = len(numbered) + 1
    places, seen = {}, False
    for position, name in enumerate(names):
        block = _block_name(name)
        if block is not None:
            seen = True
            places[name] = Place(index[block], count, index[block] + 1, levels)
        elif position > last_block:
            places[name] = Place(count - 1, count, levels, levels)
        elif not seen:
            places[name] = Place(0, count, 0, levels)
        else:
            before = max(index[b] for n in names[:position] if (b := _block_name(n)) is not None)
            places[name] = Place(before, count, before + 1, levels)
    return places
