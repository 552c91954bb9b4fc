"""The inventory of a model: every module and parameter with its place and roles, as plain data.

Built once, on the meta device or on real weights, before any wrapping or sharding; selectors are matched against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trainc.compiler.model.adapters import Adapter, adapters_of, base_of
from trainc.compiler.model.batch_statistics import uses_batch_statistics
from trainc.compiler.model.undisturbed import keep_state
from trainc.compiler.structure.blocks import find_blocks
from trainc.compiler.structure.places import Place, find_places, lowest
from trainc.compiler.structure.roles import (
    ADAPTER,
    HEAD,
    NORM,
    find_roles,
    is_adapted_by_peft,
    is_matrix,
    looks_like_end,
    own_class,
    own_parameters,
    parameter_roles,
    type_names,
)
from trainc.compiler.structure.weights import UsedWeight, find_weights

_UNCALLED = "NonDynamicallyQuantizableLinear"
"""The class of the output projection of an nn.MultiheadAttention, whose weight is used without a call."""


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """A module under its first name: class names from its own up, roles and its direct parameters' names.

    `aliases` are the other names of the same object, `places` where it stands under each name. `batch_statistics` says
    whether it normalizes over the batch, in the mode that it is in.
    """

    name: str
    types: tuple[str, ...]
    places: tuple[Place, ...]
    roles: frozenset[str]
    matrix: bool
    parameters: tuple[str, ...]
    numel: int
    ndim: int
    trainable: bool
    batch_statistics: bool
    aliases: tuple[str, ...]

    @property
    def place(self) -> Place:
        return lowest(self.places)

    @property
    def is_never_called(self) -> bool:
        """Whether it is the output projection of an nn.MultiheadAttention, which uses its weight directly."""
        return _UNCALLED in self.types


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """A parameter under its first name; `aliases` are the other names of the same tensor (tied weights).

    `modules` are all that hold it, in the order of its names; `types`, `places` and `roles` are those of all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    modules: tuple[str, ...]
    types: tuple[str, ...]
    places: tuple[Place, ...]
    roles: frozenset[str]
    matrix: bool
    trainable: bool
    aliases: tuple[str, ...]

    @property
    def is_never_called(self) -> bool:
        """Whether it is of a layer that is never called, which is the output projection of an nn.MultiheadAttention."""
        return _UNCALLED in self.types

    @property
    def module(self) -> str:
        """Return the first of the modules that hold it."""
        return self.modules[0]

    @property
    def place(self) -> Place:
        """Return where it stands: of a shared tensor, the place nearest to the input."""
        return lowest(self.places)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Inventory:
    """All modules and parameters of one model, and its weights that are matrices, in registration order."""

    model: str
    modules: tuple[ModuleEntry, ...]
    parameters: tuple[ParameterEntry, ...]
    weights: tuple[UsedWeight, ...] = ()

    @cached_property
    def module(self) -> dict[str, ModuleEntry]:
        """Return modules by every name they have."""
        return {name: m for m in self.modules for name in (m.name, *m.aliases)}

    @cached_property
    def parameter(self) -> dict[str, ParameterEntry]:
        """Return parameters by every name they have."""
        return {name: p for p in self.parameters for name in (p.name, *p.aliases)}

    @cached_property
    def weight_of(self) -> dict[str, UsedWeight]:
        """Return the weights that map inputs, all but embeddings, by the names of the parameters that make them."""
        return {
            name: used
            for used in self.weights
            if "Embedding" not in self.parameter[used.parameters[0]].types
            for name in used.parameters
        }

    @property
    def trainable(self) -> tuple[ParameterEntry, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    @property
    def has_adapters(self) -> bool:
        return any(ADAPTER in p.roles for p in self.parameters)

    @cached_property
    def signature(self) -> list[list[object]]:
        """Return names, shapes and dtypes: what a saved program checks before it binds to a model."""
        return [[p.name, list(p.shape), p.dtype] for p in self.parameters]


def build_inventory(model: nn.Module) -> Inventory:
    """Return the inventory of `model`; no weight is read."""
    where, roles = _describe(model)
    names = _names_of(model.named_modules(remove_duplicate=False))
    modules = tuple(_module_entry(names[id(m)], m, where, roles) for m in model.modules())
    inventory = Inventory(own_class(model).__name__, modules, ())
    return replace(
        inventory,
        parameters=tuple(_parameters(model, inventory.module, where, roles)),
        weights=tuple(find_weights(model, roles)),
    )


def _describe(model: nn.Module) -> tuple[dict[str, Place], dict[str, set[str]]]:
    """Return places and roles of every module and parameter under each of its names."""
    with base_of(model):
        blocks = find_blocks(model)
        roles = find_roles(model, blocks)
        where = find_places(model, blocks, roles)
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in where:  # an adapter, or inside one: it is where its layer is
            layer = name.rpartition(".")[0]
            by_name = any(map(looks_like_end, layer.split(".")))
            where[name] = where[layer]
            roles[name] = roles[layer] - ({NORM} if by_name else {NORM, HEAD})
            for leaf, parameter in own_parameters(module).items():
                own = parameter_roles(leaf, parameter, module, outside=False)
                where[f"{name}.{leaf}"], roles[f"{name}.{leaf}"] = where[name], roles[name] | own
    _mark_adapters(model, roles)
    return where, roles


def _mark_adapters(model: nn.Module, roles: Mapping[str, set[str]]) -> None:
    """Mark the layers that have an adapter, and the parameters of the adapters."""
    ours = {id(found.layer) for found in adapters_of(model)}
    for name, layer in model.named_modules(remove_duplicate=False):
        of_peft = is_adapted_by_peft(layer)
        if not of_peft and id(layer) not in ours:
            continue
        roles[name].add(ADAPTER)
        for child, part in layer.named_children():
            if child != "base_layer" if of_peft else isinstance(part, Adapter):
                for leaf, _ in part.named_parameters(remove_duplicate=False):
                    roles[f"{name}.{child}.{leaf}".removeprefix(".")].add(ADAPTER)


def _names_of(named: Iterable[tuple[str, object]]) -> dict[int, list[str]]:
    """Return all names of each object by its `id`."""
    found: dict[int, list[str]] = {}
    for name, one in named:
        found.setdefault(id(one), []).append(name)
    return found


def _module_entry(
    names: Sequence[str],
    module: nn.Module,
    where: Mapping[str, Place],
    roles: Mapping[str, set[str]],
) -> ModuleEntry:
    direct = list(module.named_parameters(names[0], recurse=False))
    weight = _weight(module)
    return ModuleEntry(
        name=names[0],
        types=type_names(module),
        places=tuple(dict.fromkeys(where[name] for name in names)),
        roles=frozenset().union(*(roles[name] for name in names)),
        matrix=any(
            is_matrix(leaf, p, module, roles[f"{names[0]}.{leaf}".lstrip(".")])
            for leaf, p in own_parameters(module).items()
        ),
        parameters=tuple(n for n, _ in direct),
        numel=sum(p.numel() for _, p in direct),
        ndim=weight.dim() if weight is not None and hasattr(weight, "dim") else 0,
        trainable=any(p.requires_grad for _, p in direct),
        batch_statistics=uses_batch_statistics(module),
        aliases=tuple(names[1:]),
    )


def _weight(module: nn.Module) -> Any:
    """Return a module's `weight`; to compute one, as spectral norm does, may change buffers: they are put back."""
    computed = isinstance(getattr(type(module), "weight", None), property)
    with keep_state(module) if computed else nullcontext(), torch.no_grad():
        return getattr(module, "weight", None)


def _parameters(
    model: nn.Module,
    modules: Mapping[str, ModuleEntry],
    where: Mapping[str, Place],
    roles: Mapping[str, set[str]],
) -> Iterator[ParameterEntry]:
    names = _names_of(model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        own = names[id(parameter)]
        owners = [modules[n.rpartition(".")[0]] for n in own]
        held = [
            (n.rpartition(".")[2], model.get_submodule(o.name))
            for n, o in zip(own, owners, strict=True)
        ]
        yield ParameterEntry(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            bytes=parameter.numel() * parameter.element_size(),
            modules=tuple(dict.fromkeys(owner.name for owner in owners)),
            types=tuple(dict.fromkeys(t for owner in owners for t in owner.types)),
            places=tuple(dict.fromkeys(where[n] for n in own)),
            roles=frozenset().union(*(roles[n] for n in own)),
            matrix=any(
                is_matrix(leaf, parameter, module, roles[n])
                for n, (leaf, module) in zip(own, held, strict=True)
            ),
            trainable=parameter.requires_grad,
            aliases=tuple(own[1:]),
        )
