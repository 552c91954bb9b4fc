"""Learning rates that grow with the batch, and what else has to move so that training stays the same per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Duration, Effect, Problem, Samples
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, ListOf, Number, Record

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.optimizer import LrFactor, OptionValue
    from trainc.runtime.step.record import Step


KEEP = Effect(
    "optimizer",
    "keep the average of squared gradients where its half-life changes",
    ("optimizer_state",),
    ("optimizer_state",),
)


class BatchScaling(Construct):
    """Multiplies each learning rate by `(batch / reference) ** 0.5` (`sqrt`) or by `batch / reference` (`linear`).

    The factor is set before every step from the batch of that step. Use `sqrt` for Adam and similar
    optimizers: Malladi et al. derive it from a stochastic differential equation that training
    approximates. `linear` is the rule of Goyal et al. for SGD with momentum, used after a
    warm-up and known to fail beyond a certain batch; it has no support for Adam. Neither rule holds
    always: compare with a run without it. With `none` the rates stay.

    A batch that changes also changes what is counted in steps. `beta2 = half_life` holds the half-life of
    Adam's second moment in samples (Marek et al.): `beta2 ** (batch / reference)`. The average keeps its
    value where its half-life changes: torch corrects its bias as if every step had had the beta of now, so
    it is rescaled by `(1 - new ** t) / (1 - old ** t)` after `t` steps. `decay = linear` holds the timescale
    of weight decay in samples, which is `batch / (rate * decay)` (Bergsma et al.): the product of rate and
    decay grows in proportion to the batch, so that decay is multiplied by `batch / reference` over the
    factor of the rate. Where the batch is the reference nothing changes, bit for bit. What is in force is
    in the plan, and among the metrics of a step (`adamw.beta2`, `adamw.weight_decay`).

    Without `reference`, the factor is 1 for the batch that the run starts with. A spec without
    `data` needs `reference`; the batch is then what each step is given.
    """

    cite: ClassVar = (
        "sqrt: Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, NeurIPS 2022, "
        "arXiv:2205.10287; linear: Goyal et al., Accurate, Large Minibatch SGD, 2017, arXiv:1706.02677; beta2: Marek "
        "et al., Small Batch Size Training for Language Models, NeurIPS 2025, arXiv:2507.07101; decay: Bergsma et al., "
        "Power Lines, NeurIPS 2025, arXiv:2505.13738"
    )
    usage: ClassVar = "lr batch_scaling { rule = sqrt, reference = 32 samples }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("rates", "scale rates with the batch", reads=("batch",), writes=("rate", "metrics")),
        KEEP,
    )

    rule: Literal["sqrt", "linear", "none"] = Field(
        default="sqrt",
        description="how the factor grows with the batch: with its square root, in proportion, or not at all",
    )
    reference: Samples | None = Field(
        default=None,
        description="batch whose factor is 1, in samples. Default: the batch that the run starts with",
    )
    beta2: Literal["half_life"] | None = Field(
        default=None,
        description="hold the half-life of Adam's second moment in samples, and so in tokens",
    )
    decay: Literal["linear"] | None = Field(
        default=None,
        description="hold the timescale of weight decay in samples, and so in tokens: rate times decay grows in "
        "proportion to the batch",
    )

    @field_validator("reference")
    @classmethod
    def _is_an_amount(cls, value: Duration | None) -> Duration | None:
        if value is not None and (value.unit != "samples" or value.amount <= 0):
            raise ValueError("expected an amount of samples such as `32 samples`")
        return value

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it keeps an average only where it changes its half-life."""
        return effect != KEEP or self.beta2 is not None

    def describe(self, effect: Effect) -> str:
        """Return what scales with the batch."""
        if effect == KEEP:
            return effect.action
        what = {
            "rates": self.rule != "none",
            "decays": self.decay,
            "the half-life of squares": self.beta2,
        }
        return f"scale {', '.join(name for name, on in what.items() if on)} with the batch"

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn where nothing is scaled, or the batch never changes, so that every factor is 1."""
        if self.rule == "none" and self.beta2 is None and self.decay is None:
            help = "write another `rule`, `beta2 = half_life` or `decay = linear`, or remove the clause"
            yield Problem(
                "no-effect",
                "`rule = none` alone scales nothing",
                field="rule",
                help=help,
                severity="warning",
            )
            return
        sizes = bound.sizes
        if sizes is None or sizes.changing:
            return
        if self.reference in (None, Duration(sizes.start, "samples")):
            yield Problem(
                "no-effect",
                "the batch never changes, so the factor is always 1",
                field="",
                help="let the batch change, as with `batch = follow(gns, ...)` in `data`, or write a `reference`",
                severity="warning",
            )

    def by_definition(self, batch: int, reference: float) -> float:
        """Return the factor of a batch on the rate by definition: a power of batch / reference."""
        exponent: float = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[self.rule]
        return math.pow(batch / reference, exponent)

    def factor(self, batch: int, reference: float) -> float:
        """Return the factor of a batch on the rate, in samples as `reference` is."""
        ratio = batch / reference
        return {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[self.rule]

    def decay_factor(self, batch: int, reference: float) -> float:
        """Return the factor of a batch on weight decay, with which rate times decay is in proportion to the batch."""
        return batch / reference / self.factor(batch, reference)

    def lower(self, to: Lowering) -> None:
        """Give the selected parameters one factor for each thing that scales, set before every step."""
        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        start = to.starting_batch
        if self.reference is None and start is None:
            raise ValueError(
                f"`{to.label}` needs `reference`, such as `reference = 32 samples`, because the spec has no `data`"
            )
        reference = self.reference.amount if self.reference else float(start or 0)
        names = [parameter.name for parameter in to.parameters()]
        factors: list[LrFactor] = []
        if self.rule != "none":
            factors.append(to.lr_factor("batch", names))
            factors[-1].of_batch = lambda size: self.factor(size, reference)
        if self.decay is not None:
            factors.append(to.option_factor("weight_decay", "batch", names))
            factors[-1].of_batch = lambda size: self.decay_factor(size, reference)
        if self.beta2 is not None:
            factors.append(to.option_factor("half_life", "batch", names))
            factors[-1].of_batch = lambda size: reference / size
            betas = to.optimizer_options("betas")
            to.action(KeepSecondMoment(f"{to.label} second moment", factors[-1], names, betas))
        to.action(ScaleWithBatch(to.label, self, factors, reference))


@dataclass(eq=False)
class ScaleWithBatch(Action):
    """Phase 2: sets the factors from the batch of the step; `reference` in samples."""

    phase = Phase.RATES
    name: str
    construct: BatchScaling
    factors: list[LrFactor]
    reference: float
    seen: list[int] = field(default_factory=list)

    def run(self, step: Step) -> None:
        size = step.batch_size
        if size < 1:
            raise ValueError(
                f"`{self.name}` needs the batch size of this step, which is not known: call "
                "`program.step(batch)` or `program.loss(batch)` without `program.begin()` before it, or "
                "add a `data` clause to the spec"
            )
        for one in self.factors:
            assert one.of_batch is not None
            one.factor = one.of_batch(size)
        step.metrics[self.name] = self.construct.factor(size, self.reference)
        self.seen = [min([size, *self.seen]), max([size, *self.seen])]

    def state_dict(self) -> ActionState:
        return {"seen": list(self.seen)} if self.seen else {}

    def state_form(self) -> Form:
        return Record({"seen": ListOf(Count(1), 2)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = [int(size) for size in state.get("seen", [])]

    def summary(self) -> str | None:
        if not self.seen:
            return None
        low, high = (self.construct.factor(size, self.reference) for size in self.seen)
        sizes = f"batches from {self.seen[0]} to {self.seen[1]} samples"
        also = {
            "the half-life of squares": self.construct.beta2,
            "the timescale of decay": self.construct.decay,
        }
        held = " and ".join(what for what, on in also.items() if on)
        told = f"{self.name}: factors {low:.3g} to {high:.3g}, {sizes}"
        return f"{told}; held in samples: {held}" if held else told


@dataclass(eq=False)
class KeepSecondMoment(Action):
    """Phase 9, before the optimizer: where a half-life changes, keeps the averages of squares that it is of.

    Adam divides its average by `1 - beta2 ** t`: with another beta2 the same average would count as another one.
    """

    phase = Phase.OPTIMIZER
    reads_shards = True
    name: str
    factor: LrFactor
    parameters: list[str]
    betas: Callable[[], dict[str, OptionValue]]
    last: float = 1.0
    """The factor of the step before."""

    def run(self, step: Step) -> None:
        before, self.last = self.last, self.factor.factor
        if before == self.last:
            return
        options = self.betas()
        for name in self.parameters:
            state = step.optimizer_state(name)
            if name not in options or "exp_avg_sq" not in state:
                continue
            option = options[name]
            assert isinstance(option, tuple)
            beta, taken = option[-1].at(step.clock), float(state["step"])
            old, new = (1 - beta ** (taken / f) for f in (before, self.last))
            for key in ("exp_avg_sq", "max_exp_avg_sq"):
                if key in state and old:
                    state[key].mul_(new / old)

    def state_dict(self) -> ActionState:
        return {} if self.last == 1.0 else {"last": self.last}

    def state_form(self) -> Form:
        return Record({"last": Number()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = float(state.get("last", 1.0))
