"""What terms on features share: a vector of a selected layer for each target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainc.compiler.errors import SiteError
from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.runtime.step.observer import Seen

_WIDTHS = ("out_features", "num_features", "out_channels", "num_channels", "embedding_dim")
"""Attributes of layers that say how wide what they give is."""


def one_module(bound: Targets) -> Iterator[Problem]:
    """Yield an error unless `on` selects one module."""
    if len(bound.modules) > 1:
        names = ", ".join(f"`{m.name}`" for m in bound.modules[:3])
        more = ", ..." if len(bound.modules) > 3 else ""
        message = f"the features are those of one module, and `on` selects {len(bound.modules)}: {names}{more}"
        yield Problem("wrong-target-kind", message, help='select one, such as `on "norm"`')


def width_of(module: nn.Module) -> int | None:
    """Return how wide what a layer gives is, as far as its class says so."""
    shape = getattr(module, "normalized_shape", None)
    found = shape[-1] if shape else next((getattr(module, n, None) for n in _WIDTHS), None)
    found = found or next((n for name in _WIDTHS if (n := getattr(module, name, None))), None)
    return found if isinstance(found, int) else None


def rows_of(forward: Seen, module: str, label: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features (N, D) of a captured module, the class of each (N,), and which count; of every view.

    Raises SiteError where the module gives no vector for each target, or a target is no class.
    """
    targets, counted = forward.targets, forward.counted
    if targets.is_floating_point():
        raise SiteError(
            f"`{label}` compares features by their classes, and the targets are floating-point numbers: it needs a loss"
            " of class indices, such as cross-entropy",
            label,
        )
    calls = forward.captured[module]
    if len(calls) != 1:
        raise SiteError(
            f"`{label}` reads the features of `{module}`, which runs {len(calls)} times in a pass: select a module that"
            " runs once",
            label,
        )
    features = calls[0]
    if targets.dim() == 1 and features.dim() > 2 and all(n == 1 for n in features.shape[2:]):
        features = features.flatten(1)
    if features.dim() != targets.dim() + 1 or features.shape[1:-1] != targets.shape[1:]:
        raise SiteError(
            f"`{label}` needs a vector for each target, and `{module}` gives {list(features.shape)} for targets"
            f" {list(targets.shape)}: select a module that gives {[*targets.shape, 'width']}, such as the layer before"
            " the head",
            label,
        )
    views = forward.views
    return (
        features.reshape(-1, features.shape[-1]),
        targets.reshape(-1).repeat(views),
        counted.reshape(-1).repeat(views),
    )
