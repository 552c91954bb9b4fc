"""The lowered method: what the clauses of a spec ask of the program, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainc.compiler.method.sites import Rewrite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.method.loss import Loss
    from trainc.dsl.text.source import Span
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.action import Action
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.update_mask import SelectedEntries

Scheduled = Callable[["Clock"], float]

Inputs = Mapping[str, "Tensor"]


@dataclass(slots=True)
class PenaltyTerm:
    """A loss term over parameters: `value(parameters, inputs)`, with the tensors it needs as named graph inputs."""

    value: Callable[[Inputs, Inputs], Tensor]
    parameters: tuple[str, ...]


class OptimizerConstruct(Protocol):
    """What the compiler asks of the construct of an optimizer clause."""

    clip: float | None
    """Global L2 norm that the gradients are scaled down to."""
    moments: ClassVar[int]
    """How many tensors of the parameter's size the state holds."""

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""
        ...

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""
        ...


@dataclass(slots=True)
class OptimizerPart:
    """One optimizer clause with the parameters it claims."""

    label: str
    targets: tuple[str, ...]
    span: Span | None
    construct: OptimizerConstruct
    base: Scheduled
    decay: dict[str, float]


@dataclass(slots=True)
class CalibrationPart:
    """When a clause wants every parameter measured, and on how many examples."""

    label: str
    gate: Gate
    examples: int


@dataclass(slots=True)
class LoweredMethod:
    """Everything the clauses asked for; `Program` assembles it."""

    rewrite: Rewrite = field(default_factory=Rewrite)
    loss: Loss | None = None
    penalties: dict[str, PenaltyTerm] = field(default_factory=dict)
    scalars: dict[str, Scheduled] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lr_factors: dict[str, list[LrFactor]] = field(default_factory=dict)
    selected_entries: dict[str, SelectedEntries] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    optimizers: list[OptimizerPart] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    batch_gradients: dict[str, bool] = field(default_factory=dict)
    """Parameters of which the squared norm of each micro-batch's gradient is taken, or, where True, of the gradient
    that a replica has summed so far."""
    calibrations: list[CalibrationPart] = field(default_factory=list)
