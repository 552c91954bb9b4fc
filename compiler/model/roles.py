"""Roles of modules and parameters, such as `norm` or `head`, and their place: block and depth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trainc.dsl.text.vocabulary import ROLES

NORM, BIAS, EMBEDDING, ATTENTION, MLP, HEAD = ROLES

_NAMES = {
    ATTENTION: {"attn", "attention", "self_attn", "self_attention", "cross_attn", "mha"},
    MLP: {"mlp", "ffn", "ff", "feed_forward", "feedforward", "linear1", "linear2", "intermediate"},
    EMBEDDING: {"embed", "embeddings", "embedding", "wte", "wpe", "embed_tokens", "pos_embed"},
    HEAD: {"head", "lm_head", "classifier", "score", "fc_out", "output_head"},
}
"""The segments of dotted names that give a role."""


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


def type_names(module: object) -> tuple[str, ...]:
    """Return the class names of `module`: its own and those it inherits from, without nn.Module."""
    return tuple(
        dict.fromkeys(
            c.__name__ for c in type(module).__mro__ if c.__name__ not in ("Module", "object")
        )
    )


def segment_roles(name: str) -> set[str]:
    """Return the roles that the segments of a dotted name give."""
    segments = set(name.lower().split("."))
    return {role for role, names in _NAMES.items() if segments & names}


def module_roles(name: str, module: nn.Module) -> set[str]:
    """Return the roles that the name and the class of a module give."""
    found = segment_roles(name)
    types = type_names(module)
    if any("norm" in t.lower() for t in types) and not list(module.children()):
        found.add(NORM)
    if "Embedding" in types:
        found.add(EMBEDDING)
    return found


def last_linear(model: nn.Module) -> str | None:
    """Return the name of the last linear layer: the head, if no module is named as one."""
    linear = [name for name, module in model.named_modules() if "Linear" in type_names(module)]
    return linear[-1] if linear else None


def _block_name(name: str) -> str | None:
    """Return the name up to and with its first number (`blocks.3` of `blocks.3.mlp`), or None without one."""
    segments = name.split(".")
    for i, segment in enumerate(segments):
        if segment.isdigit():
            return ".".join(segments[: i + 1])
    return None


def places(model: nn.Module) -> dict[str, Place]:
    """Return the place of every module: blocks in registration order, then what follows them, the head.

    Without at least two numbered blocks, every layer that holds parameters is a block of its own.
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
    found, current = {}, 0
    for name in names:
        if name in leaves:
            current = leaves.index(name)
        found[name] = Place(current, count, current, max(count - 1, 0))
    return found


def _places_by_blocks(names: list[str], numbered: list[str]) -> dict[str, Place]:
    index = {block: i for i, block in enumerate(numbered)}
    last_block = max(i for i, name in enumerate(names) if _block_name(name) is not None)
    has_head = last_block + 1 < len(names)
    count = len(numbered) + (1 if has_head else 0)
    levels = len(numbered) + 1
    found, latest = {}, -1
    for position, name in enumerate(names):
        block = _block_name(name)
        if block is not None:
            latest = max(latest, index[block])
            found[name] = Place(index[block], count, index[block] + 1, levels)
        elif position > last_block:
            found[name] = Place(count - 1, count, levels, levels)
        elif latest < 0:
            found[name] = Place(0, count, 0, levels)
        else:
            found[name] = Place(latest, count, latest + 1, levels)
    return found
