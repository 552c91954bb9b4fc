"""What the actions of one step share: the step itself, what it measured, and the contributions of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from trainc.runtime.schedule.clock import Clock


@dataclass(slots=True)
class Contribution:
    """What one micro-batch left behind, in units of the step's gradient: sums over contributions equal it.

    `weights` has shape (examples,) and sums to the micro-batch's share of the loss; `squares[name]`, same shape, are
    the examples' squared norms, `gradients[name]`, (examples, numel), their contributions themselves where asked for.
    `whole[name]`, 0-d, is the squared norm of the micro-batch's gradient where that was asked for. Where a
    contribution is of a group, `examples` (all examples,) are the weights of its single examples. `replica` is who took
    the micro-batch.
    """

    weights: Tensor
    squares: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    examples: Tensor | None = None
    replica: int = 0


@dataclass(slots=True)
class Calibrated:
    """A few examples measured one by one, whatever the layers: what `Squares` needs of every parameter."""

    weights: Tensor
    squares: dict[str, Tensor]
    whole: dict[str, Tensor]


class Signals(dict[str, float]):
    """What was measured last, by name; NaN for what was not measured yet."""

    def __missing__(self, name: str) -> float:
        return math.nan


@dataclass(slots=True)
class Step:
    """One optimizer step as its actions see it."""

    clock: Clock
    parameters: Mapping[str, Parameter]
    signals: Signals
    batch_size: int
    micro_size: int
    metrics: dict[str, float] = field(default_factory=dict)
    contributions: list[Contribution] = field(default_factory=list)
    calibrations: dict[str, Calibrated] = field(default_factory=dict)
    series: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    loss: float = 0.0
    save: bool = False
    notes: list[str] = field(default_factory=list)
    preconditioners: Sequence[Callable[[str], Tensor | None]] = ()

    def preconditioner(self, name: str) -> Tensor | None:
        """Return what the optimizer multiplies a parameter's gradient by; None where it does not say, or not yet."""
        found = (of(name) for of in self.preconditioners)
        return next((scale for scale in found if scale is not None), None)


@runtime_checkable
class Preconditions(Protocol):
    """An action that scales gradients entry by entry, as Adam does."""

    def preconditioner(self, name: str) -> Tensor | None: ...
