"""Weights that a layer computes before it runs: of a parametrization, or by a hook, as `torch.nn.utils.prune` does.

The hooks are those of prune, weight_norm and spectral_norm of `torch.nn.utils`: before each call of the layer they
compute a plain tensor `weight` of its parameters `weight_orig`, or `weight_g` and `weight_v`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

By = Literal["prune", "weight_norm", "spectral_norm"]
_SCALED = {"_WeightNorm", "_SpectralNorm"}
"""Parametrizations of torch that multiply a weight, or its rows, by a number: what is zero stays zero."""


@dataclass(frozen=True, slots=True)
class Hooked:
    """How a hook computes a weight: `parameters` of the layer by name, the one in the weight's shape last."""

    by: By
    parameters: tuple[str, ...]
    hook: Any

    @property
    def words(self) -> str:
        return "as pruned" if self.by == "prune" else f"by {self.by}"


def hooked_weights(layer: nn.Module) -> dict[str, Hooked]:
    """Return how hooks of a layer compute its weights, by the name of the weight, such as `weight` or `bias`."""
    found: dict[str, Hooked] = {}
    by: By
    ends: tuple[str, ...]
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            name, by, ends = hook._tensor_name, "prune", ("orig",)
        elif isinstance(hook, WeightNorm):
            name, by, ends = hook.name, "weight_norm", ("g", "v")
        elif isinstance(hook, SpectralNorm):
            name, by, ends = hook.name, "spectral_norm", ("orig",)
        else:
            continue
        parameters = tuple(f"{name}_{end}" for end in ends)
        if name not in layer._parameters and all(one in layer._parameters for one in parameters):
            found[name] = Hooked(by, parameters, hook)
    return found


def parametrized_weights(layer: nn.Module) -> dict[str, list[str]]:
    """Return the parameters of each parametrized weight of a layer, named from the layer on."""
    lists: Any = layer._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {
        leaf: [f"parametrizations.{leaf}.{name}" for name, _ in chain.named_parameters()]
        for leaf, chain in lists.items()
    }


def compute_weight(layer: nn.Module, leaf: str) -> Tensor:
    """Return a weight of a layer as the layer would compute it now; nothing of the layer is changed."""
    hooked, value = hooked_weights(layer).get(leaf), None
    if hooked is None:
        value = getattr(layer, leaf)
    elif hooked.by == "prune":
        value = getattr(layer, hooked.parameters[0]) * getattr(layer, f"{leaf}_mask")
    elif hooked.by == "weight_norm":
        value = hooked.hook.compute_weight(layer)
    else:
        value = hooked.hook.compute_weight(layer, do_power_iteration=False)
    assert isinstance(value, Tensor)
    return value


def computed_from(model: nn.Module, name: str) -> tuple[str, nn.Module, str] | None:
    """Return the weight that is computed of a parameter: its name, its layer, and its name in the layer.

    None for a parameter that layers use as it is.
    """
    path, _, rest = name.rpartition(".")
    if ".parametrizations." in f".{name}":
        before, _, after = f".{name}".rpartition(".parametrizations.")
        path, leaf = before.removeprefix("."), after.partition(".")[0]
        return f"{path}.{leaf}".removeprefix("."), model.get_submodule(path), leaf
    layer = model.get_submodule(path)
    for leaf, hooked in hooked_weights(layer).items():
        if rest in hooked.parameters:
            return f"{path}.{leaf}".removeprefix("."), layer, leaf
    return None


def refuse_computed(model: nn.Module, name: str) -> None:
    """Raise ValueError for a parameter of which a hook computes a weight before its layer runs.

    A layer that is to compute with another tensor in the place of the parameter would not: the weight is there already.
    """
    found = computed_from(model, name)
    hooked = None if found is None else hooked_weights(found[1]).get(found[2])
    if found is not None and hooked is not None:
        raise ValueError(
            f"`{found[0]}` is computed of `{name}` by a hook of torch.nn.utils.{hooked.by}, before its layer runs, so"
            f" that a change of `{name}` in the layer would reach nothing: {_instead(hooked.by)}, or exclude it from"
            " `on`"
        )


def refuse_lost_zeros(model: nn.Module, name: str) -> None:
    """Raise ValueError where zeros of a parameter are not the zeros of the weight that is computed of it."""
    found = computed_from(model, name)
    if found is None:
        return
    weight, layer, leaf = found
    hooked = hooked_weights(layer).get(leaf)
    if hooked is not None and hooked.by == "prune":
        raise ValueError(
            f"`{weight}` is pruned by torch.nn.utils.prune: its own zeros are not those of `{name}`, so that a"
            f" density would be of other entries. Write them into the weight, `torch.nn.utils.prune.remove(layer,"
            f' "{leaf}")`, or exclude it from `on`'
        )
    lists: Any = layer._modules.get("parametrizations")
    chain = [] if hooked is not None else [type(one).__name__ for one in lists[leaf]]
    if lost := [one for one in chain if one not in _SCALED]:
        raise ValueError(
            f"`{weight}` is computed of `{name}` by {lost[0].lstrip('_')}, so that zeros of `{name}` need not be zeros"
            f" of the weight: exclude it from `on`, or remove the parametrization,"
            f' `torch.nn.utils.parametrize.remove_parametrizations(layer, "{leaf}")`'
        )


def refuse_other_singular_values(model: nn.Module, name: str) -> None:
    """Raise ValueError where a layer computes its weight of a parameter, whose singular values are not the weight's."""
    found = computed_from(model, name)
    if found is not None:
        raise ValueError(
            f"`{found[0]}` is computed of `{name}`, whose singular values are not those of the weight: exclude it from"
            " `on`, or remove what computes the weight (a parametrization, or a hook as of torch.nn.utils.prune)"
        )


def _instead(by: By) -> str:
    if by == "prune":
        return 'write the zeros into the weight, `torch.nn.utils.prune.remove(layer, "weight")`'
    return f"use torch.nn.utils.parametrizations.{by}"
