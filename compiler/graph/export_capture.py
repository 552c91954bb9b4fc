"""The first capture front end: torch.export.

Everything that depends on how torch.export keeps track of sizes is in this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from trainc.compiler.graph.interface import Port
from trainc.compiler.graph.listing import Symbols, size_text
from trainc.compiler.graph.sizes import Axes, condition
from trainc.compiler.graph.wrapped_model import WrappedModel
from trainc.runtime.data.batch import Batch


class SizesFixed(RuntimeError):
    """A model can be captured for one size only along an axis that was to stay open."""


def export_capture(
    wrapped: WrappedModel, arguments: tuple[Any, ...], dynamic_shapes: Any = None
) -> fx.GraphModule:
    """Capture with torch.export, non-strict: it keeps names and parameter objects."""
    with warnings.catch_warnings():
        # torch's notices are about its own internals.
        warnings.simplefilter("ignore")
        program = torch.export.export(
            wrapped, arguments, strict=False, dynamic_shapes=dynamic_shapes
        )
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def open_shapes(batch: Batch, ports: Sequence[Port], scalars: int, axes: Axes) -> Any:
    """Return the `dynamic_shapes` of torch.export for a wrapped model, whose `axes` stay open."""
    _, packing = pytree.tree_flatten(batch)
    dims = [dict.fromkeys(axes.get(port.name, {}), Dim.DYNAMIC) or None for port in ports]
    shapes = pytree.tree_unflatten(dims, packing)
    return (*shapes, (None,) * scalars) if scalars else shapes


def open_values(
    module: fx.GraphModule, ports: Sequence[Port], axes: Axes
) -> tuple[list[Tensor], Symbols]:
    """Return the fake values of a captured module's inputs, and the names of the symbols of their sizes.

    Axes that share a name have one symbol afterwards. Later conditions on sizes are kept from here on.
    """
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    environment = values[0].fake_mode.shape_env
    # torch.export ignores new conditions once it is done.
    environment.frozen = False
    first: dict[str, Any] = {}
    for port, value in zip(ports, values, strict=False):
        for axis, name in axes.get(port.name, {}).items():
            if not value.shape[axis] == first.setdefault(name, value.shape[axis]):
                raise SizesFixed(f"`{port.name}` has another size `{name}` than the others")
    symbols: dict[Any, Any] = {}
    for name, size in first.items():
        symbol = size.node.expr if isinstance(size, torch.SymInt) else None
        if symbol is None or not symbol.is_Symbol or symbol in symbols:
            raise SizesFixed(f"the size `{name}` is fixed to {size}")
        symbols[symbol] = type(symbol)(name, integer=True)
    return values, symbols


def conditions(value: Tensor, sizes: Symbols) -> tuple[str, ...]:
    """Return as text the conditions under which what was traced from a fake value holds for other sizes.

    Raises SizesFixed where a size can be one number only, or a condition cannot be checked before a step.
    """
    environment: Any = value.fake_mode.shape_env  # type: ignore[attr-defined]
    if environment.deferred_runtime_asserts:
        raise SizesFixed("a size depends on the values of a tensor")
    for symbol, name in sizes.items():
        if environment.replace(symbol) != symbol:
            raise SizesFixed(f"the size `{name}` is fixed to {environment.replace(symbol)}")
    found: dict[str, None] = {}
    for guard in environment.guards:
        expression = environment.replace(guard.expr)
        if expression == True:  # noqa: E712  (the truth of sympy)
            continue
        text = size_text(expression, sizes)
        try:
            condition(text)(dict.fromkeys(map(str, sizes.values()), 2))
        except ZeroDivisionError:  # two examples of two positions need not be among the sizes
            pass
        except (ValueError, KeyError) as error:
            raise SizesFixed(f"a condition on sizes cannot be checked: {text}") from error
        found[text] = None
    return tuple(found)
