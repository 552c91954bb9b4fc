"""EMA: an exponential moving average of the weights, with which the model is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.constructs.regularize.weights._average import Average
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.dsl.values.value_json import Expr, Number

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
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
    Averages of 16-bit weights are held in float32, and rounded where they are used. Entries that a mask sets
    to zero become zero in e with them. Replicas that average gradients have the same e; under `distribute` each has
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
        decay = to.schedule(self.decay)

        def decay_at(step: Step, update: int) -> float:
            now = decay(step.clock)
            if not 0 <= now <= 1:
                raise ValueError(
                    f"{to.label}: the decay is {now:g} at step {step.clock.steps}: expected 0 or more, at most 1"
                )
            return self.decay_at(update, now)

        to.action(Average(to.label, held, decay_at, copies_buffers=self.buffers == "copy"))

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
