"""The lowered method: what the clauses of a spec ask of the program, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trainc.compiler.method.loss import Loss
from trainc.compiler.method.losses import Losses, LossPart
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.statistic import BatchGradient
from trainc.dsl.text.source import Span
from trainc.runtime.companion.companion import Companion
from trainc.runtime.companion.history import History
from trainc.runtime.mask.update_mask import UpdateMask
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.soundness.gradient_norm import ModelGradient
from trainc.runtime.step.action import Action
from trainc.runtime.step.batches import BatchTransform
from trainc.runtime.step.gradients import Paused
from trainc.runtime.step.held_updates import DecayForm
from trainc.runtime.step.observer import Observer
from trainc.runtime.step.optimizer import LrFactor, Option, OptionValues

Scheduled = Callable[["Clock"], float]
"""A number as a function of the clock."""


class OptimizerConstruct(Protocol):
    """What lowering needs of the construct of an optimizer clause."""

    decay_form: ClassVar[DecayForm | None]
    """How the weights are decayed, where the update depends on them by their decay alone; None for any other."""

    @property
    def moments(self) -> float:
        """Return how many tensors of the parameter's size the state holds."""
        ...

    @property
    def clip(self) -> float | None:
        """Return the L2 norm that the gradients of the clause are scaled down to; None to leave them."""
        ...

    def examine(self) -> None:
        """Raise ImportProblem when the torch optimizer cannot be built; called before it is."""
        ...

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer over parameter-group dicts that carry `params` and `weight_decay`."""
        ...


@dataclass(slots=True)
class OptimizerPart:
    """One optimizer clause: the parameters it claims, and the options of each, such as its rate and decay."""

    label: str
    targets: tuple[str, ...]
    span: Span | None
    construct: OptimizerConstruct
    options: dict[str, OptionValues]
    asks: bool = False
    """Whether it asks for loss and gradients several times in a step, by a closure."""
    steady: bool = False
    """Whether the learning rate is one number, which an optimizer may change by itself."""
    has_modes: bool = False
    """Whether the torch optimizer has `train()` and `eval()`, and other weights for evaluation."""

    def decays(self, parameter: str) -> bool:
        """Say whether it decays a parameter in some step."""
        return parameter in self.options and self.option(parameter, "weight_decay").constant != 0

    def option(self, parameter: str, name: str) -> Option:
        """Return an option of a parameter that is one number, 0 where it has none."""
        value = self.options[parameter].get(name)
        assert not isinstance(value, tuple)
        return Option.fixed(0.0) if value is None else value


@dataclass(slots=True)
class CalibrationPart:
    """When a clause wants every parameter measured, and on how many examples."""

    label: str
    gate: Gate
    examples: int


@dataclass(frozen=True, slots=True)
class MeasuredWeight:
    """A weight that a clause measures: the names and sizes of the parts that it divides into, and why it does so."""

    clause: str
    weight: str
    parts: tuple[str, ...]
    sizes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class NeedsWhole:
    """Parameters that a clause needs whole on each process, why, and what to do where one is sharded."""

    clause: str
    parameters: tuple[str, ...]
    why: str
    instead: str

    def message(self, shard: str) -> str:
        """Return what is said of a parameter that is sharded."""
        return f"{self.why}, and `{shard}` is sharded over processes (FSDP2). {self.instead}"


@dataclass(slots=True)
class LoweredMethod:
    """Everything that the clauses of a spec ask for. `Program` runs it, and the plan is its printed form."""

    rewrite: Rewrite = field(default_factory=Rewrite)
    needs_whole: list[NeedsWhole] = field(default_factory=list)
    loss_parts: list[LossPart] = field(default_factory=list)
    """The losses, in the order of the spec."""
    scalars: dict[str, Scheduled] = field(default_factory=dict)
    """Numbers that a step computes from the clock, by the name of the tensor that carries each."""
    schedules: dict[str, Scheduled] = field(default_factory=dict)
    """Numbers that actions compute from the clock, by the name that the plan shows."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Constants of loss terms, by name."""
    live_tensors: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """What gives tensors that hooks and terms read as they are now, by name."""
    lr_factors: dict[str, list[LrFactor]] = field(default_factory=dict)
    """Factors on the learning rate, by parameter."""
    option_factors: dict[str, list[LrFactor]] = field(default_factory=dict)
    """Factors on other options of optimizers, by parameter."""
    masks: dict[str, UpdateMask] = field(default_factory=dict)
    """What trains of each parameter that has a mask."""
    frozen: set[str] = field(default_factory=set)
    """Parameters that do not train, besides those without requires_grad."""
    frozen_by: dict[str, set[str]] = field(default_factory=dict)
    """The parameters that each clause freezes, by its label."""
    paused: list[Paused] = field(default_factory=list)
    """Parameters that clauses keep from training in some steps."""
    trained_by: dict[str, OptimizerConstruct] = field(default_factory=dict)
    """The optimizer clause's construct of each parameter, known before any clause is lowered."""
    optimizers: list[OptimizerPart] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    compiled: bool = False
    """Whether torch compiles the modules."""
    replayed: bool = False
    """Whether the passes of step graphs are recorded and replayed where the device can do it."""
    clip: float | None = None
    """The L2 norm that the gradients of all optimizers together are scaled down to; None to leave them."""
    model_gradient: ModelGradient = field(default_factory=ModelGradient)
    """The gradients that the optimizers read."""
    batch_gradients: dict[str, BatchGradient] = field(default_factory=dict)
    """Parameters of which the squared norm of each micro-batch's or replica's gradient is taken."""
    calibrations: list[CalibrationPart] = field(default_factory=list)
    exchanges: list[str] = field(default_factory=list)
    """Labels of the clauses that exchange with other replicas after steps, between which each trains on its own."""
    elastic: set[str] = field(default_factory=set)
    """Labels of those of them whose replicas may leave and join."""
    joined_by: str | None = None
    """The label of the clause that joins the processes of a launched run."""
    shards: bool = False
    """Whether they then each hold a part of every parameter."""
    process_dependence: dict[str, str] = field(default_factory=dict)
    """The modules whose numbers depend on how many processes are joined, and why."""
    measured: list[MeasuredWeight] = field(default_factory=list)
    """The weights that clauses measure part by part."""
    evaluation_observers: list[Observer] = field(default_factory=list)
    """What reads evaluations."""
    evaluated_with: dict[str, Companion] = field(default_factory=dict)
    """Whose values evaluation and saving use in place of the trained weights, by the label of its clause."""

    @property
    def id_readers(self) -> tuple[str, ...]:
        """The labels of the clauses that read, in some step, which samples the examples are."""
        terms = [term.clause for term in self.rewrite.terms.values() if term.reads_ids]
        kinds = (Observer, BatchTransform)
        asking = (one for one in self.actions if isinstance(one, kinds) and one.sample_ids)
        actions = [one.name for one in asking if not isinstance(one, History)]  # of such a term
        return tuple(dict.fromkeys([*terms, *actions]))

    @property
    def taken_early(self) -> dict[str, Callable[[Tensor], object]]:
        """What gets gradients where a graph computes them: masks that keep a part, and free the rest at once."""
        masks = self.masks.items()
        measured = self.batch_gradients
        return {n: mask.take for n, mask in masks if mask.frees_gradient and n not in measured}

    @property
    def loss(self) -> Loss | None:
        """The first loss, of whose output and targets terms are; None without any."""
        return self.loss_parts[0].loss if self.loss_parts else None

    @property
    def losses(self) -> Losses:
        """All losses."""
        return Losses(self.loss_parts)
