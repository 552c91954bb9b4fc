"""The weights of a model as it uses them, and the units that are measured: the matrices that they consist of.

A weight may be computed: of a parametrization, by a hook of its layer (`computed_weights.py`), or as a sum with updates
of low rank beside it, W + s B A. A tied weight is there once, under its first name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainc.compiler.structure.computed_weights import (
    compute_weight,
    hooked_weights,
    parametrized_weights,
)
from trainc.compiler.structure.divisions import divide
from trainc.compiler.structure.matrices import WHOLE, Division, Part
from trainc.compiler.structure.roles import is_matrix, own_parameters

By = Literal["whole", "part", "head"]
"""How finely weights are divided."""
_BASE = "base_layer"
"""Where layers of peft keep the layer that they adapt."""


@dataclass(frozen=True, slots=True)
class UsedWeight:
    """A weight that is a matrix, or several: its name, its layer's, its shape, and the parameters it is computed of.

    `computed` says how, in words; it is empty for a parameter as it is.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    division: Division
    computed: str = ""

    @property
    def reason(self) -> str:
        """Return why the weight is divided as it is, and how it is computed."""
        return "; ".join(filter(None, (self.division.reason, self.computed)))

    def units(self, by: By = "part") -> list[MatrixUnit]:
        """Return its units: the weight as one, its parts, or heads of attention where there are any."""
        division = self.division
        parts = {"whole": (WHOLE,), "head": division.heads}.get(by) or division.parts
        return [MatrixUnit(self, part, *division.shape(self.shape, part)) for part in parts]


@dataclass(frozen=True, slots=True)
class MatrixUnit:
    """What is measured together: `count` matrices of `outputs` x `inputs`, a part of a weight."""

    weight: UsedWeight
    part: Part
    count: int
    outputs: int
    inputs: int

    @property
    def name(self) -> str:
        """Return the weight's name, with the part's: `h.0.attn.c_attn.weight[q]`."""
        return f"{self.weight.name}[{self.part.name}]" if self.part.name else self.weight.name

    @property
    def eigenvalues(self) -> int:
        return self.count * min(self.outputs, self.inputs)

    @property
    def size(self) -> str:
        """Return its size in words: `768x768`, or `9 of 64x32`."""
        one = f"{self.outputs}x{self.inputs}"
        return one if self.count == 1 else f"{self.count} of {one}"


def find_weights(model: nn.Module, roles: Mapping[str, set[str]]) -> Iterator[UsedWeight]:
    """Yield the weights that are matrices, in registration order; `roles` are those of modules and parameters."""
    modules = dict(model.named_modules())
    updates = dict(_updates(modules))
    inside = {name for names, _ in updates.values() for name in names}
    seen: set[int] = set()
    for path, layer in modules.items():
        for leaf, shape, names, computed in _own_weights(path, layer):
            tensors = [model.get_parameter(name) for name in names]
            if inside & set(names) or all(id(t) in seen for t in tensors):
                continue
            if not all(t.is_floating_point() or t.is_complex() for t in tensors):
                continue  # such as one that is quantized
            seen |= set(map(id, tensors))
            name = f"{path}.{leaf}".removeprefix(".")
            found = roles.get(names[0], set()) | roles.get(path, set())
            if not is_matrix(leaf, torch.empty(shape, device="meta"), layer, found):
                continue
            if (division := divide(leaf, shape, layer, *_place(path, modules))) is None:
                continue
            more, added = updates.get(name, ((), ""))
            words = "; ".join(filter(None, (computed, added)))
            yield UsedWeight(name, path, shape, (*names, *more), division, words)


def read_weight(model: nn.Module, weight: UsedWeight) -> Tensor:
    """Return a weight as the model uses it now, without a graph."""
    layer, leaf = model.get_submodule(weight.module), weight.name.rpartition(".")[2]
    with torch.no_grad(), _not_training(layer):
        return _updated(model, weight.module, compute_weight(layer, leaf)).detach()


def find_units(weights: Iterable[UsedWeight], by: By = "part") -> list[MatrixUnit]:
    """Return the units of weights, in order."""
    return [unit for weight in weights for unit in weight.units(by)]


def read_units(
    model: nn.Module,
    units: Sequence[MatrixUnit],
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """Return the matrices of units by name, (count, outputs, inputs) each; every weight is read once.

    `gather` is applied to weights before they are divided.
    """
    weights = {unit.weight.name: unit.weight for unit in units}
    values = {name: gather(read_weight(model, weight)) for name, weight in weights.items()}
    return {u.name: u.weight.division.stack(values[u.weight.name], u.part) for u in units}


def _own_weights(
    path: str, layer: nn.Module
) -> Iterator[tuple[str, tuple[int, ...], list[str], str]]:
    """Yield the weights of a layer itself: last name, shape, the parameters it is computed of, and how."""
    prefix = f"{path}." if path else ""
    for leaf, names in parametrized_weights(layer).items():
        with torch.no_grad(), _not_training(layer):
            shape = tuple(getattr(layer, leaf).shape)
        yield leaf, shape, [f"{prefix}{name}" for name in names], "as parametrized"
    inside = set()
    for leaf, hooked in hooked_weights(layer).items():
        inside |= set(hooked.parameters)
        shape = tuple(layer.get_parameter(hooked.parameters[-1]).shape)
        yield leaf, shape, [f"{prefix}{name}" for name in hooked.parameters], hooked.words
    for own, parameter in own_parameters(layer).items():
        if own not in inside:
            yield own, tuple(parameter.shape), [f"{prefix}{own}"], ""


def _place(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, nn.Module | None]:
    """Return a layer's name in its parent, and the parent; what peft puts between them does not count."""
    above, _, segment = path.rpartition(".")
    if segment == _BASE and above in modules:
        above, _, segment = above.rpartition(".")
    return segment, modules.get(above) if path else None


@contextmanager
def _not_training(layer: nn.Module) -> Iterator[None]:
    """Keep parametrizations from changing their buffers while they compute a weight."""
    parts = [m for m in layer.modules() if m is not layer and m.training]
    for module in parts:
        module.training = False
    try:
        yield
    finally:
        for module in parts:
            module.training = True


# Updates beside a layer


def _updates(
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[str, tuple[tuple[str, ...], str]]]:
    """Yield, for each weight with updates, their parameters and what they are called."""
    for path, layer in modules.items():
        if _is_peft(layer):
            prefix = f"{path}." if path else ""
            base = f"{prefix}{_BASE}."
            names = (f"{prefix}{n}" for n, _ in layer.named_parameters())
            own = tuple(n for n in names if not n.startswith(base))
            if own:
                yield f"{base}weight", (own, "with the update of its adapter")
        for child, module in layer._modules.items():
            if getattr(module, "changes_weight", False) and module is not None:
                prefix = f"{path}.{child}.".removeprefix(".")
                own = tuple(f"{prefix}{n}" for n, _ in module.named_parameters())
                yield f"{path}.weight".removeprefix("."), (own, "with the update of its adapter")


def _updated(model: nn.Module, path: str, value: Tensor) -> Tensor:
    """Return the weight of a layer with its updates."""
    layer: Any = model.get_submodule(path)
    for module in layer._modules.values():
        if getattr(module, "changes_weight", False):
            value = module.used_weight(layer, value)
    above, _, segment = path.rpartition(".")
    if segment == _BASE and _is_peft(around := model.get_submodule(above)):
        adapted: Any = around
        if not adapted.merged and not adapted.disable_adapters:
            for name in adapted.active_adapters:
                if name in adapted.scaling:
                    value = value + _delta(adapted, name)
    return value


def _delta(layer: Any, name: str) -> Tensor:
    """Return what an adapter of peft adds to the weight of its layer: s B A, or of DoRA m V / |V| - W."""
    if name not in (variants := getattr(layer, "lora_variant", {})):
        found: Tensor = layer.get_delta_weight(name)
        return found
    held: dict[str, Any] = getattr(layer, "_caches", {})
    weight, kept = layer.get_base_layer().weight, dict(held)
    change: Tensor = variants[name].merge_safe(layer, name, weight) - weight
    held.clear()  # of the norm that it keeps to undo a merger
    held.update(kept)
    return change


def _is_peft(layer: nn.Module) -> bool:
    """Say whether a module is a layer of peft whose weight is that of another plus updates of low rank, or DoRA's."""
    held: Any = layer
    rescaled = getattr(held, "lora_magnitude_vector", {})
    return (
        isinstance(layer._modules.get(_BASE), nn.Module)
        and "lora_A" in layer._modules
        and hasattr(layer, "get_delta_weight")
        and all(name in rescaled for name in getattr(held, "lora_variant", ()))
    )
