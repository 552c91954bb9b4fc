"""Where a change of the output of a linear layer acts: on the layer's own output, or on that of its adapters.

Adapters beside another module, such as a block, are such places, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from trainc.compiler.model.inventory import Inventory, ModuleEntry

LINEAR = frozenset(("Linear", "Conv1D"))
"""Class names of layers whose output has the channels on its last axis; Conv1D is that of transformers."""
_PEFT = "BaseTunerLayer"
"""The class of peft that every layer with one of its adapters has among its bases."""


@dataclass(frozen=True, slots=True)
class LinearOutput:
    """A module whose output is h, or the dh that an adapter adds to a layer's."""

    module: ModuleEntry
    of_adapter: bool = False


class _Unfit(Exception):
    """A layer has an adapter of which the output is no part of the layer's own."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.help = help


def linear_outputs(selected: Iterable[ModuleEntry], inventory: Inventory) -> list[LinearOutput]:
    """Return the sites of the selected linear layers, each once; other layers are left out.

    A layer with adapters, selected itself or by a module inside it, stands for their outputs. Of another module that
    has adapters beside it, these are selected by itself or by what is inside them.
    """
    found: dict[str, LinearOutput] = {}
    for entry in selected:
        try:
            for site in _sites_of(entry, inventory):
                found.setdefault(site.module.name, site)
        except _Unfit:
            continue
    return [*found.values()]


def output_problems(
    selected: Iterable[ModuleEntry], inventory: Inventory, what: str
) -> Iterator[Problem]:
    """Yield a problem for the selected modules that have no such output, and why; `what` is what acts on it."""
    wrong = []
    for entry in selected:
        try:
            if not _sites_of(entry, inventory):
                wrong.append(entry)
        except _Unfit as unfit:
            message = f"{unfit}; {what} is supported for adapters of LoRA"
            yield Problem("wrong-target-kind", message, help=unfit.help)
            return
    if wrong:
        message = (
            f"`{wrong[0].name}` is a {wrong[0].types[0]}; {what} is supported for Linear and transformers' Conv1D"
            " layers only"
        )
        more = (f"other selected modules that are neither: {len(wrong) - 1}",) if wrong[1:] else ()
        help = "select linear layers: `& type(Linear, Conv1D)`"
        yield Problem("wrong-target-kind", message, notes=more, help=help)
    inner = [m.name for m in selected if m.is_never_called]
    if inner:
        message = f"`{inner[0]}` is never called: nn.MultiheadAttention uses its weight directly"
        yield Problem("wrong-target-kind", message, help="exclude it from `on`")


def _sites_of(entry: ModuleEntry, inventory: Inventory) -> list[LinearOutput]:
    """Return the sites that a selected module stands for: none where it is no linear layer."""
    for name in _with_ancestors(entry.name):
        adapters = _adapters(inventory.module[name], inventory)
        if name != entry.name and not LINEAR.intersection(inventory.module[name].types):
            adapters = [one for one in adapters if one.name in _with_ancestors(entry.name)]
        if adapters:
            return [LinearOutput(adapter, of_adapter=True) for adapter in adapters]
    return [LinearOutput(entry)] if LINEAR.intersection(entry.types) else []


def _with_ancestors(name: str) -> Iterator[str]:
    """Yield the name of a module, and those of the modules around it, outwards."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _adapters(layer: ModuleEntry, inventory: Inventory) -> list[ModuleEntry]:
    """Return the modules whose outputs adapters add to a linear layer's; raises _Unfit where none is such a module."""
    if not LINEAR.intersection(layer.types):
        return [m for m in _children(layer.name, inventory) if "ChannelAdapter" in m.types]
    if _PEFT in layer.types:
        return _peft_adapters(layer, inventory)
    return [m for m in _children(layer.name, inventory) if "Adapter" in m.types]


def _peft_adapters(layer: ModuleEntry, inventory: Inventory) -> list[ModuleEntry]:
    """Return those that train of the modules of peft's LoRA and DoRA whose outputs, times constants, are dh."""
    kind = next((name for name in layer.types if name.endswith("Layer")), _PEFT)
    by_adapter = {
        entry.name.rpartition(".")[2]: entry
        for held in ("lora_B", "lora_magnitude_vector")
        for entry in _children(f"{layer.name}.{held}", inventory)
    }
    factors = [*by_adapter.values()]
    if not factors:
        raise _Unfit(
            f"the adapter of `{layer.name}` is of peft's {kind}, which does not add a term of its own to the layer's"
            " output",
            "select layers without such adapters, or use LoRA",
        )
    return [factor for factor in factors if factor.trainable] or factors


def _children(name: str, inventory: Inventory) -> Iterator[ModuleEntry]:
    prefix = f"{name}."
    for entry in inventory.modules:
        inside = entry.name.removeprefix(prefix)
        if entry.name.startswith(prefix) and "." not in inside:
            yield entry
