"""The inventory of a model: every module and parameter with its place and roles, as plain data.

Built once, on the meta device or on real weights, before any wrapping or sharding; selectors are matched against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trainc.compiler.model.roles import (
    BIAS,
    HEAD,
    Place,
    last_linear,
    module_roles,
    places,
    segment_roles,
    type_names,
)
from trainc.compiler.model.undisturbed import keep_state


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
        return math.prod(self.shape)

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


def build_inventory(model: nn.Module) -> Inventory:
    """Return the inventory of `model`; no weight is read."""
    where, last = places(model), last_linear(model)
    roles = {name: module_roles(name, module) for name, module in model.named_modules()}
    if last is not None and not any(HEAD in found for found in roles.values()):
        roles[last] |= {HEAD}
    modules = tuple(
        _module_entry(n, m, where[n], frozenset(roles[n])) for n, m in model.named_modules()
    )
    by_name = {m.name: m for m in modules}
    return Inventory(type(model).__name__, modules, tuple(_parameters(model, by_name)))


def _module_entry(name: str, module: nn.Module, place: Place, roles: frozenset[str]) -> ModuleEntry:
    direct = list(module.named_parameters(name, recurse=False))
    weight = _weight(module)
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


def _weight(module: nn.Module) -> Any:
    """Return a module's `weight`; to compute one, as spectral norm does, may change buffers: they are put back."""
    computed = isinstance(getattr(type(module), "weight", None), property)
    with keep_state(module) if computed else nullcontext(), torch.no_grad():
        return getattr(module, "weight", None)


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
            roles=owner.roles | ({BIAS} if leaf.endswith("bias") else set()) | segment_roles(leaf),
            trainable=parameter.requires_grad,
            aliases=tuple(n for n in names[id(parameter)] if n != name),
        )
