"""The layers that multiply by a weight: which they are, and what they compute with another weight.

`rows` of a weight are its outputs, whatever the axis that the layer has them on: (out, in), or (out, in * kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from copy import copy
from itertools import product
from typing import TYPE_CHECKING, Any

from trainc.dsl.reading.construct import Problem, RuleExplanation

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.model.inventory import Inventory, ModuleEntry

LINEAR = ("Linear", "Conv1D")
KINDS = (*LINEAR, "Conv1d", "Conv2d", "Conv3d", "Embedding")
"""Class names of layers that multiply by a weight; Conv1D is that of transformers."""
RULES = {
    "layer-without-adapter": RuleExplanation(
        "A selected layer cannot have an adapter of this kind.",
        "An adapter of low rank changes a product with a weight. A layer of another kind, or one that is never called,"
        " would get an adapter that does nothing.",
        "Select layers of the kinds that the message names, or exclude the layer from `on`.",
    )
}


def layer_problem(
    entry: ModuleEntry, inventory: Inventory, kinds: tuple[str, ...]
) -> Problem | None:
    """Return why a module is no layer of these kinds with a plain weight of floating-point numbers; None if it is."""
    if entry.is_never_called:
        return Problem(
            "layer-without-adapter",
            f"`{entry.name}` cannot have an adapter: it is the output projection of an nn.MultiheadAttention,"
            " which uses the weight directly and never calls the layer",
            help="exclude it: `- type(NonDynamicallyQuantizableLinear)`",
        )
    name = weight_name(entry)
    plain = name in entry.parameters and inventory.parameter[name].dtype.startswith(
        ("float", "bfloat")
    )
    if plain and not set(kinds).isdisjoint(entry.types):
        return None
    used = next((one for one in inventory.weights if one.name == name != one.parameters[0]), None)
    if used is not None and not set(kinds).isdisjoint(entry.types):
        return Problem(
            "layer-without-adapter",
            f"`{entry.name}` cannot have an adapter: its weight is computed of `{used.parameters[0]}` in every pass"
            f" ({used.computed})",
            help="remove the parametrization, by `torch.nn.utils.parametrize.remove_parametrizations` or"
            ' `torch.nn.utils.prune.remove(layer, "weight")`, or exclude the layer from `on`',
        )
    named = [f"nn.{kind}" for kind in kinds if kind != "Conv1D"]
    return Problem(
        "layer-without-adapter",
        f"`{entry.name}` cannot have an adapter: it is no {', no '.join(named)} and no Conv1D of transformers with a"
        " plain weight of floating-point numbers",
        help=f"select such layers only, as by `& type({', '.join(kinds)})`",
    )


def weight_name(entry: ModuleEntry) -> str:
    """Return the name of a layer's weight."""
    return f"{entry.name}.weight".removeprefix(".")


def sizes(entry: ModuleEntry, inventory: Inventory) -> tuple[int, int]:
    """Return how many outputs and inputs the weight of a layer has."""
    shape = inventory.parameter[weight_name(entry)].shape
    found = shape[0], math.prod(shape[1:])
    return found[::-1] if {"Conv1D", "Embedding"} & {*entry.types} else found


def excess_rank(
    bound: Targets,
    rank: int,
    kinds: tuple[str, ...],
    smallest: Callable[[ModuleEntry, Inventory], int] = lambda entry, inventory: sizes(
        entry, inventory
    )[0],
) -> Iterator[Problem]:
    """Yield a warning where a product of this rank is no more than one of a smaller rank, as the weight is small.

    `smallest` gives the fewest outputs of a layer that have a product of their own.
    """
    small: list[tuple[str, int]] = []
    for entry in bound.modules:
        if layer_problem(entry, bound.inventory, kinds) is None:
            most = min(sizes(entry, bound.inventory)[1], smallest(entry, bound.inventory))
            if rank > most:
                small.append((entry.name, most))
    if small:
        name, most = small[0]
        more = f" ({len(small)} of the {len(bound.modules)} selected layers have such)" * (
            len(bound.modules) > 1
        )
        yield Problem(
            "no-effect",
            f"ranks above {most} give `{name}` no change that rank {most} does not: its weight is not larger{more}",
            field="rank",
            help=f"write `rank = {most}` or less, with the same ratio of `alpha`, or select these layers by a clause of"
            " their own",
            severity="warning",
        )


def refuse_options(name: str, layer: Any) -> None:
    """Raise ValueError for a layer with an option under which it is no plain product with its weight."""
    if is_convolution(layer) and layer.groups > 1:
        raise ValueError(
            f"`{name}` is a convolution in {layer.groups} groups, whose weight holds no product of two smaller ones:"
            " exclude it from `on`"
        )
    if _changed_kind(layer) == "Embedding" and output_scale(layer) is None:
        raise ValueError(
            f"`{name}` is an embedding whose class, {_own(layer).__name__}, has a `forward` of its own, which may"
            f" look up something else than its input: exclude it from `on`, as by `- type({_own(layer).__name__})`"
        )
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"`{name}` is an embedding with `max_norm`, which changes its weight whenever it runs: exclude it from"
            " `on`, or build the model without `max_norm`"
        )


def refuse_own_forward(layer: Any) -> None:
    """Raise ValueError for a layer whose class computes something else than torch's of its kind."""
    kind = _changed_kind(layer)
    if kind is not None and output_scale(layer) is None and not _computes_the_product(layer):
        raise ValueError(
            f"the `forward` of {_own(layer).__name__} is not that of nn.{kind}, and would change the update, too. Keep"
            " the adapter, and write it by `program.save_adapters`"
        )


def output_scale(layer: Any) -> Any:
    """Return what an embedding of transformers multiplies what it looks up by; None for other layers."""
    return getattr(layer, "embed_scale", None) if _changed_kind(layer) == "Embedding" else None


def scaled(layer: Any, change: Tensor) -> Tensor:
    """Return what a change of a layer's products adds to its output."""
    import torch

    scale = output_scale(layer)
    if scale is None:
        return change
    return change * torch.as_tensor(scale, dtype=change.dtype, device=change.device)


def _own(layer: Any) -> type:
    own: type = getattr(type(layer), "unbound", type(layer))
    return own


def _changed_kind(layer: Any) -> str | None:
    """Return which of torch's layers a layer is that has a `forward` of its own; None where it has torch's."""
    from torch import nn

    own: Any = _own(layer)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    kind = next((k for k in kinds if isinstance(layer, k)), None)
    return None if kind is None or own.forward is kind.forward else kind.__name__


def _computes_the_product(layer: Any) -> bool:
    """Say whether the `forward` of a linear layer or convolution gives what torch's gives of its weight and bias.

    It is tried on random inputs, with random numbers as weights and as all else that the layer holds, in both modes. In
    float64, where that runs, inputs are small and large too, which tells from limits and functions that are linear
    around zero. The layer and the random streams stay as they are.
    """
    import torch
    from torch import nn

    from trainc.compiler.model.undisturbed import random_states

    if isinstance(layer, nn.Embedding):
        return False
    restore = random_states(layer)
    try:
        own = _trials(layer, layer.weight.dtype, (1.0,))
        wide = _trials(layer, torch.float64, (1e-4, 1.0, 1e4)) if all(own) else []
    finally:
        restore()
    return any(own) and all(own) and all(wide)


def _trials(layer: Any, dtype: torch.dtype, scales: tuple[float, ...]) -> list[bool]:
    """Return whether each input that the `forward` of a layer takes in this dtype gives the product with the weight."""
    import torch

    draw = torch.Generator().manual_seed(0)
    found = []
    with torch.no_grad():
        for shape in _input_shapes(layer):
            for scale, training in product(scales, (True, False)):
                try:
                    twin = _random_twin(layer, dtype, draw)
                    twin.training = training
                    if twin.bias is not None:
                        twin.bias.mul_(scale)  # hides no small output
                    x = torch.randn(shape, generator=draw).to(layer.weight.device, dtype) * scale
                    expected = apply_weight(layer, x, twin.weight, twin.bias)
                    given = _own(layer).forward(twin, x.clone())  # type: ignore[attr-defined]
                except Exception as error:
                    if "memory" in str(error):
                        raise
                    continue  # not an input that it takes
                found.append(_is_close(given, expected))
    return found


def _input_shapes(layer: Any) -> list[tuple[int, ...]]:
    """Return shapes of inputs of a linear layer or a convolution."""
    if not is_convolution(layer):
        return [(*rows, layer.weight.shape[1]) for rows in ((5,), (2, 3), (2, 2, 3))]
    kernels = zip(layer.kernel_size, layer.dilation, strict=True)
    return [(2, layer.in_channels, *(apart * (size - 1) + 3 for size, apart in kernels))]


def _random_twin(layer: Any, dtype: torch.dtype, draw: Generator) -> Any:
    """Return a layer of the same class and settings, with random tensors, no modules inside and no hooks."""
    import torch
    from torch import Tensor

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=draw).to(value.device, dtype)
        return torch.randint(2, value.shape, generator=draw).to(value.device, value.dtype)

    own: Any = _own(layer)
    twin = own.__new__(own)
    for name, value in vars(layer).items():
        changes = isinstance(value, (MutableSequence, MutableMapping, MutableSet))
        vars(twin)[name] = copy(value) if changes else drawn(value)
    for held in ("_parameters", "_buffers"):
        vars(twin)[held] = {name: drawn(value) for name, value in vars(layer)[held].items()}
    vars(twin)["_modules"] = {}  # adapters; a `forward` that calls another module raises
    vars(twin).pop("trainc", None)
    return twin


def _is_close(given: Any, expected: Tensor) -> bool:
    """Say whether a result is another one up to the rounding of its dtype, or of float32 where that is coarser."""
    import torch

    if not isinstance(given, torch.Tensor) or given.shape != expected.shape:
        return False
    if given.dtype != expected.dtype:
        return False
    limit = max(4 * torch.finfo(expected.dtype).eps, 1e-5)
    wide = torch.promote_types(expected.dtype, torch.float32)
    given, expected = given.to(wide), expected.to(wide)
    return bool((given - expected).norm() <= limit * expected.norm())


def is_convolution(layer: Any) -> bool:
    """Say whether a layer is one of torch's convolutions."""
    from torch import nn

    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_transposed(layer: Any) -> bool:
    """Say whether the weight has the outputs on its last axis, as that of an embedding."""
    from torch import nn

    return not isinstance(layer, nn.Linear) and not is_convolution(layer)


def output_count(layer: Any) -> int:
    """Return the outputs of a layer: the rows of its weight."""
    return int(layer.weight.shape[-1 if is_transposed(layer) else 0])


def rows_of(layer: Any, weight: Tensor) -> Tensor:
    """Return a weight of a layer by rows."""
    return weight.T if is_transposed(layer) else weight.flatten(1)


def from_rows(layer: Any, rows: Tensor) -> Tensor:
    """Return rows in the shape of the layer's weight."""
    return rows.T if is_transposed(layer) else rows.view(layer.weight.shape)


def by_output(layer: Any, values: Tensor) -> Tensor:
    """Return a number for each output (out,) in a shape that broadcasts with the layer's output."""
    if is_convolution(layer):
        return values.view(-1, *[1] * (layer.weight.dim() - 2))
    return values


def along_rows(layer: Any, values: Tensor) -> Tensor:
    """Return a number for each row (out,) in a shape that broadcasts with the layer's weight."""
    if is_transposed(layer):
        return values
    return values.view(-1, *[1] * (layer.weight.dim() - 1))


def apply_weight(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a layer that is no embedding gives of an input with another weight, and this bias or none."""
    from torch.nn import functional

    if is_convolution(layer):
        found: Tensor = layer._conv_forward(x, weight, bias)
        return found
    return functional.linear(x, weight.T if is_transposed(layer) else weight, bias)
