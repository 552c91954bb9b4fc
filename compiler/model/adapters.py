"""Adapters: children of layers, which clauses add to a model. Make, add, find, hide and remove them; freeze the rest.

An adapter runs in a forward hook of its layer, so the layer keeps its class, its parameters and their names. A layer
that a clause's hooks surround runs them itself, inside of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.compiler.model.meta_device import SkipInitialization
from trainc.compiler.structure.sequences import has_items_alone, keep_items

_FROZEN = "trainc_frozen"
"""The attribute of a module that names its own parameters which adapting the model froze."""

Parts = Mapping[str, nn.Module | nn.Parameter]


class Adapter(nn.Module):
    """The modules and parameters that a clause adds to a layer; called with the layer's inputs."""

    beside_items = True
    """It is no item of a sequence that it is a child of."""

    def __init__(self, rule: AdapterRule, label: str, layer_name: str, parts: Parts) -> None:
        super().__init__()
        self.rule, self.label, self.layer_name = rule, label, layer_name
        self.trained: tuple[str, ...] = ()
        """The parameters that train besides those of adapters, as far as the same clause says so."""
        self.order = 0
        """The place of its clause among those that adapt the model."""
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.add_module(name, part)

    def forward(self, *inputs: Tensor, layer: Any = None, output: Any = None) -> Tensor:
        """Return what the adapter computes of the layer's inputs, and of the layer and its output if it is given."""
        if layer is None:
            return self.rule.run_adapter(self, *inputs)
        return self.rule.run_beside(self, layer, output, *inputs)

    @property
    def changes_weight(self) -> bool:
        """Say whether the layer computes with another weight, `used_weight`."""
        return self.rule.changes_weight

    def used_weight(self, layer: nn.Module, before: Tensor) -> Tensor:
        """Return the weight that the layer computes with, where it is `before` with the adapters that run earlier."""
        held: Any = layer
        found: Tensor = before + self.rule.weight_change(layer, self)
        factor = self.rule.output_factor(layer, self)
        return found if factor is None else found + (factor - 1) * (before - held.weight)

    @property
    def form(self) -> dict[str, list[int]]:
        """Return the shapes of its parameters and buffers, by name."""
        return {name: list(tensor.shape) for name, tensor in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its parameters and buffers by name."""
        yield from self.named_parameters()
        yield from self.named_buffers()


class ChannelAdapter(Adapter):
    """An adapter that adds an output with the channels on the last axis, whatever its layer is."""


class AdapterHook:
    """A hook of an adapter: it finds the adapter by name, so that copies of a layer run their own."""

    part_of_model = True
    """Copies of the model have it."""

    def __init__(self, name: str) -> None:
        self.name = name


class RunAdapter(AdapterHook):
    """The forward hook that runs an adapter after its layer."""

    def __call__(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        return None if _runs_adapters(layer) else self.apply(layer, inputs, named, output)

    def apply(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        """Return what the layer gives with the adapter, of its inputs and of what it gives without."""
        adapter = getattr(layer, self.name)
        return adapter.rule.change_output(layer, adapter, (*inputs, *named.values()), output)


class PrepareAdapter(AdapterHook):
    """The forward pre-hook of an adapter that changes what its layer is given."""

    def __call__(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if _runs_adapters(layer) else self.apply(layer, inputs, named)

    def apply(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the layer is given in place of its inputs."""
        adapter = getattr(layer, self.name)
        args, kwargs = adapter.rule.change_inputs(layer, adapter, inputs, named)
        return args, kwargs


def _runs_adapters(layer: nn.Module) -> bool:
    """Say whether a layer runs its adapters itself now: one that clauses have bound says so in what it carries."""
    bound = vars(layer).get("trainc")
    return layer.training and bool(getattr(bound, "surrounds_adapters", False))


def with_adapters(layer: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a layer computes with its adapters, where `call` is its forward pass without them."""
    before = [one for one in layer._forward_pre_hooks.values() if isinstance(one, PrepareAdapter)]
    after = [one for one in layer._forward_hooks.values() if isinstance(one, RunAdapter)]

    def run(*args: Any, **kwargs: Any) -> Any:
        for prepare in before:
            args, kwargs = prepare.apply(layer, args, kwargs)
        output = call(*args, **kwargs)
        for add in after:
            output = add.apply(layer, args, kwargs, output)
        return output

    return run if before or after else call


_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps forward hooks: each by a number, which the tables of keyword arguments share."""


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter of a model, and the layer that it is a child of."""

    layer_name: str
    layer: nn.Module
    name: str
    adapter: Adapter

    @property
    def full_name(self) -> str:
        return f"{self.layer_name}.{self.name}".removeprefix(".")

    def remove(self) -> None:
        """Take the adapter and its hooks off the layer."""
        del self.layer._modules[self.name]
        hooks = {**self.layer._forward_hooks, **self.layer._forward_pre_hooks}
        for key, hook in hooks.items():
            if isinstance(hook, AdapterHook) and hook.name == self.name:
                for table in _TABLES:
                    getattr(self.layer, table).pop(key, None)
        has_items_alone(self.layer)


def adapters_of(model: nn.Module) -> list[FoundAdapter]:
    """Return the adapters of a model, in the order in which they run on each layer; those that are hidden are not."""
    return [
        FoundAdapter(name, layer, hook.name, adapter)
        for name, layer in model.named_modules()
        for hook in layer._forward_hooks.values()
        if isinstance(hook, RunAdapter)
        and isinstance(adapter := layer._modules.get(hook.name), Adapter)
    ]


@contextmanager
def base_of(model: nn.Module) -> Iterator[None]:
    """Show the model inside this block as it was before it was adapted; it is not meant to run there."""
    found = adapters_of(model)
    children = [(one.layer._modules, dict(one.layer._modules)) for one in found]
    frozen = [(p, p.requires_grad) for _, p in _frozen(model)]
    for one in found:
        one.layer._modules.pop(one.name, None)
    for parameter, _ in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for now, before in reversed(children):
            now.clear()
            now.update(before)
        for parameter, trains in frozen:
            parameter.requires_grad_(trains)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give the model its children, its hooks and what trains back when the block raises."""
    tables = [
        (table, dict(table))
        for module in model.modules()
        for table in (module._modules, *(getattr(module, name) for name in _TABLES))
    ]
    settings = [
        (a, a.label, a.trained, a.order) for a in (one.adapter for one in adapters_of(model))
    ]
    records = [(module.__dict__, module.__dict__.get(_FROZEN)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for now, before in tables:
            if now != before:
                now.clear()
                now.update(before)
        for attributes, record in records:
            attributes.pop(_FROZEN, None)
            if record is not None:
                attributes[_FROZEN] = record
        for module in model.modules():
            has_items_alone(module)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        for adapter, label, names, order in settings:
            adapter.label, adapter.trained, adapter.order = label, names, order
        raise


def build_adapter(
    rule: AdapterRule,
    label: str,
    layer_name: str,
    parts: Callable[[], Parts],
    dtype: torch.dtype,
) -> Adapter:
    """Return an adapter without values, on the meta device; no random number is drawn."""
    with torch.device("meta"), SkipInitialization():
        kind = ChannelAdapter if rule.adds_channels else Adapter
        return kind(rule, label, layer_name, parts()).to(dtype)


def attach(layer: nn.Module, name: str, adapter: Adapter) -> None:
    """Make an adapter a child of a layer, and have it run with the layer.

    Forward hooks of the user run after it: they get the output that the layer has once the adapter is folded into it.
    """
    keep_items(layer)
    layer.add_module(name, adapter.train(layer.training))
    if type(adapter.rule).change_inputs is not AdapterRule.change_inputs:
        layer.register_forward_pre_hook(PrepareAdapter(name), with_kwargs=True)
    layer.register_forward_hook(RunAdapter(name), with_kwargs=True)
    hooks = layer._forward_hooks
    for key in [key for key, hook in hooks.items() if not isinstance(hook, AdapterHook)]:
        hooks[key] = hooks.pop(key)


def materialize(adapter: Adapter, seed_of: Callable[[str], int], device: torch.device) -> Adapter:
    """Return the adapter with its initial values: each tensor has a random stream, with the seed of its name."""
    adapter = adapter.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in adapter.tensors():
            generator = torch.Generator().manual_seed(seed_of(name))
            adapter.rule.initialize(name, tensor, generator)
    return adapter.to(device)


def take_over(adapter: Adapter, earlier: Adapter) -> Adapter:
    """Return a new adapter with the parameters of an earlier one of the same form; the earlier one if all is equal."""
    if adapter.rule == earlier.rule:
        earlier.label = adapter.label
        return earlier
    for name, tensor in earlier.tensors():
        path, _, leaf = name.rpartition(".")
        module = adapter.get_submodule(path)
        held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = tensor
    return adapter


def freeze(model: nn.Module, names: frozenset[str]) -> None:
    """Freeze parameters of these names that train, so that `unfreeze` can undo it."""
    for path, module in model.named_modules():
        own = []
        for name, parameter in module.named_parameters(recurse=False):
            if f"{path}.{name}".removeprefix(".") in names and parameter.requires_grad:
                own.append(name)
                parameter.requires_grad_(False)
        if own:
            module.__dict__[_FROZEN] = (*module.__dict__.get(_FROZEN, ()), *own)


def unfreeze(model: nn.Module) -> None:
    """Let the parameters train again that `freeze` froze."""
    for module, parameter in _frozen(model):
        parameter.requires_grad_(True)
        module.__dict__.pop(_FROZEN, None)


def _frozen(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    return [
        (module, parameter)
        for module in model.modules()
        for name in module.__dict__.get(_FROZEN, ())
        if (parameter := module._parameters.get(name)) is not None
    ]
