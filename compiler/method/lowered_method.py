"""The lowered method: what the clauses of a spec ask of the program, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trainc.compiler.method.loss import Loss
from trainc.compiler.method.sites import Rewrite
from trainc.dsl.text.source import Span
from trainc.runtime.mask.update_mask import UpdateMask
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action
from trainc.runtime.step.held_updates import DecayForm
from trainc.runtime.step.optimizer import LrFactor

Scheduled = Callable[["Clock"], float]
"""A number as a function of the clock."""
Inputs = Mapping[str, "Tensor"]
"""Tensors by name."""


@dataclass(slots=True)
class PenaltyTerm:
    """A loss term over parameters: `value(parameters, inputs)`, with the tensors it needs as named graph inputs."""

    value: Callable[[Inputs, Inputs], Tensor]
    parameters: tuple[str, ...]
    gate: Gate | None = None
    """When the term is part of the loss; None: in every step."""


class OptimizerConstruct(Protocol):
    """What lowering needs of the construct of an optimizer clause."""

    moments: ClassVar[int]
    """How many tensors of the parameter's size the state holds."""
    decay_form: ClassVar[DecayForm | None]
    """How the weights are decayed, where the update depends on them by their decay alone; None for any other."""

    @property
    def clip(self) -> float | None:
        """Return the global L2 norm that the gradients are scaled down to; None to leave them."""
        ...

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""
        ...

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""
        ...


@dataclass(slots=True)
class OptimizerPart:
    """One optimizer clause: the parameters it claims, its learning rate and the decay of each parameter."""

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
    """Everything that the clauses of a spec ask for. `Program` runs it, and the plan is its printed form."""

    rewrite: Rewrite = field(default_factory=Rewrite)
    loss: Loss | None = None
    penalties: dict[str, PenaltyTerm] = field(default_factory=dict)
    """Loss terms over parameters, by the label of their clause."""
    scalars: dict[str, Scheduled] = field(default_factory=dict)
    """Numbers that a step computes from the clock, by the name of the tensor that carries each."""
    schedules: dict[str, Scheduled] = field(default_factory=dict)
    """Numbers that actions compute from the clock, by the name that the plan shows."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Constants of loss terms, by name."""
    lr_factors: dict[str, list[LrFactor]] = field(default_factory=dict)
    """Factors on the learning rate, by parameter."""
    masks: dict[str, UpdateMask] = field(default_factory=dict)
    """What trains of each parameter that has a mask."""
    frozen: set[str] = field(default_factory=set)
    """Parameters that do not train, besides those without requires_grad."""
    optimizers: list[OptimizerPart] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    batch_gradients: dict[str, bool] = field(default_factory=dict)
    """Parameters of which the squared norm of each micro-batch's gradient is taken, or, where True, of the gradient
    that a replica has summed so far."""
    calibrations: list[CalibrationPart] = field(default_factory=list)
    exchanges: list[str] = field(default_factory=list)
    """Labels of the clauses that exchange with other replicas after steps, between which each trains on its own."""

    def ignore_times(self) -> None:
        """Keep every loss term, noise and view open, for those who look at a graph or compare numbers."""
        for term in self.penalties.values():
            term.gate = None
        rewrite = self.rewrite
        rewrite.noises = [replace(site, gate=None) for site in rewrite.noises]
        if rewrite.pairing is not None:
            rewrite.pairing = replace(rewrite.pairing, gate=None)

    def open_penalties(self, clock: Clock) -> dict[str, PenaltyTerm]:
        """Return the loss terms over parameters that are part of the loss of the step at this clock."""
        return {
            label: term
            for label, term in self.penalties.items()
            if term.gate is None or term.gate.fires(clock)
        }
