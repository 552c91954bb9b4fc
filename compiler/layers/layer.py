"""A kind of layer that can be measured: how its modules and its captured calls are recognised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.sites import LayerSite


@dataclass(frozen=True, slots=True)
class LayerMatch:
    """The operator call of a measured layer in a captured graph: its input `x`, and how to replace it.

    `insert(x, probe)` adds our operator before the call and returns the node of its result.
    """

    x: fx.Node
    insert: Callable[[fx.Node, fx.Node], fx.Node]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A kind of layer: how a module of it is recognised, bound, and found in a captured graph.

    `recognise(name, module)` returns the site of a module of this kind, None for another module, and raises
    NotMeasurable for one of this kind that cannot be measured. `weight_at` maps the ATen operators that such a layer is
    captured as to the place of the weight among their arguments; `match` reads such a call. `joins_views` says that its
    operator takes the views of an example as one more axis.
    """

    layer_type: str
    description: str
    recognise: Callable[[str, nn.Module], LayerSite | None]
    bound_class: type[BoundLayer]
    weight_at: Mapping[Any, int]
    match: Callable[[ForwardGraph, LayerSite, fx.Node], LayerMatch | None]
    joins_views: bool = False


def result_with(module: nn.Module, parameters: dict[str, nn.Parameter | None], x: Tensor) -> Any:
    """Return what a layer computes of `x` with other parameters; None when it cannot."""
    twin = copy.copy(module)
    twin._parameters = parameters
    with torch.no_grad():
        try:
            return twin.forward(x)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None


def own_names(name: str, module: nn.Module) -> dict[str, str]:
    """Return a module's direct parameters: the model's names by the module's own."""
    path = f"{name}." if name else ""
    return {own: f"{path}{own}" for own, _ in module.named_parameters(recurse=False)}
