"""EMA: an exponential moving average of the weights, with which the model is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.dsl.values.value_json import Expr, Number
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.lowered_method import Scheduled
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.step.record import Step

Warmup = Literal["none", "ratio", "power"]


class Ema(Construct):
    """Averages the weights, e <- d e + (1 - d) w after every step; evaluation and saving use e.

    The first update copies: e = w after the first step, or after the step with which `from` is reached; so does
    torch.optim.swa_utils. Update n (the copy is 0) has d = `decay`, or with a `warmup` the smaller of `decay` and (1 +
    n) / (10 + n) (`ratio`, as in TensorFlow) or 1 - (1 + n)^(-2/3) (`power`, as in timm). With `every 10 steps` e is
    updated after steps 10, 20, ...; `decay` is per update, so that decay^(1/10) per step averages over as long. After
    `until` e stays and stays in use. A step of several micro-batches is one update, a skipped step none.

    Parameters that nothing trains and those that are not selected are the model's own. Saved buffers, such as running
    statistics, are averaged alike, or with `buffers = copy` those of the model at the last update; counters are copied.
    Averages of 16-bit weights are held in float32, and rounded where they are used. An entry that a mask holds at zero
    from the first update on is zero in e. Replicas that average gradients have the same e; under `distribute` each has
    its own.

    `program.evaluate`, `program.save`, `trainc run` and a later `run { start = ... }` use e; `program.module` and the
    `model` of a checkpoint have the trained weights. In a loop of your own, `with program.evaluation_weights():`.
    """

    cite: ClassVar = (
        "Polyak and Juditsky, SIAM J. Control Optim. 30 (1992) 838; Tarvainen and Valpola, Mean teachers are better "
        "role models, NeurIPS 2017, arXiv:1703.01780"
    )
    usage: ClassVar = "regularize ema { decay = 0.999, warmup = ratio }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    identity: ClassVar = {"decay": "0"}
    effects: ClassVar = (
        Effect("observe", "update the average of the weights", ("params", "clock"), ("metrics",)),
    )

    decay: Schedule = Field(
        default=Number(0.999),
        description="how much of the average an update keeps, 0 or more, below 1",
    )
    warmup: Warmup = Field(
        default="none",
        description="how `decay` rises at the start, so that the first weights are soon forgotten",
    )
    buffers: Literal["average", "copy"] = Field(
        default="average",
        description="whether running statistics are averaged, or copied from the model at each update",
    )

    @field_validator("decay")
    @classmethod
    def _forgets(cls, value: Expr) -> Expr:
        if isinstance(value, Number) and not 0 <= value.value < 1:
            raise ValueError("expected 0 or more, below 1: with 1 the average would never change")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report a selection in which all parameters are frozen."""
        if bound.parameters and not any(p.trainable for p in bound.parameters):
            message = f"all {len(bound.parameters)} selected parameters are frozen"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")

    def lower(self, to: Lowering) -> None:
        """Keep the average beside the model, update it, and evaluate with it."""
        names = [entry.name for entry in to.parameters()]
        held = to.companion("average", since="call", parameters=names, wide=True)
        to.evaluate_with(held)
        to.action(Average(to.label, held, to.schedule(self.decay), self))

    def decay_at(self, update: int, decay: float) -> float:
        """Return d of update n, 0 of the first, which copies."""
        if update == 0:
            return 0.0
        if self.warmup == "ratio":
            return min(decay, (1 + update) / (10 + update))
        if self.warmup == "power":
            return min(decay, float(1 - (1 + update) ** (-2 / 3)))
        return decay

    def reference(self, weights: Sequence[Tensor], decays: Sequence[float]) -> Tensor:
        """Return the average of a parameter's values at the updates, entry by entry of the recursion."""
        average = weights[0]
        for n, (now, decay) in enumerate(zip(weights, decays, strict=True)):
            d = self.decay_at(n, decay)
            average = d * average + (1 - d) * now
        return average


class Average(Action):
    """Phase 12, when masks have set zeros and replicas have exchanged: updates the average."""

    phase = Phase.OBSERVE

    def __init__(self, label: str, held: Companion, decay: Scheduled, rule: Ema) -> None:
        self.name, self.held, self.decay, self.rule = label, held, decay, rule
        self.updates = 0

    def is_due(self, step: Step) -> bool:
        """Return whether the gate fires at the clock that counts this step."""
        return self.gate is None or self.gate.fires(step.clock_after())

    def run(self, step: Step) -> None:
        decay = self.decay(step.clock)
        if not 0 <= decay <= 1:
            raise ValueError(
                f"{self.name}: the decay is {decay:g} at step {step.clock.steps}: expected 0 or more, at most 1"
            )
        if self.held.made:
            decay = self.rule.decay_at(self.updates, decay)
            own = self.held.values.keys() - self.held.parameters
            self.held.follow(decay, copied=own if self.rule.buffers == "copy" else ())
        else:
            self.updates, decay = 0, self.rule.decay_at(0, decay)
            self.held.copy()
        self.updates += 1
        step.metrics[f"{self.name}.decay"] = decay

    def state_dict(self) -> ActionState:
        return {"updates": self.updates} if self.updates else {}

    def state_form(self) -> Form:
        return Record({"updates": Count(1)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state.get("updates", 0))

    def summary(self) -> str | None:
        if not self.updates:
            return f"{self.name}: no average was made, so evaluation used the trained weights"
        from trainc.kernels.parameter.multi_norm import multi_norm

        apart = size = 0.0
        for name, (average, now) in self.held.pairs().items():
            if name in self.held.parameters:
                # One at a time: the differences of all take as much memory as the model.
                apart += float(multi_norm([average - now.to(average.dtype)])[0, 0])
                size += float(multi_norm([now])[0, 0])
        distance, norm = apart**0.5, size**0.5
        part = f" ({distance / norm:.2g} of their norm)" if norm else ""
        updates = f"{self.updates} update{'s' * (self.updates > 1)}"
        return (
            f"{self.name}: evaluation and saving use the average of {updates}, {distance:.4g} from the trained weights"
            f"{part}"
        )
