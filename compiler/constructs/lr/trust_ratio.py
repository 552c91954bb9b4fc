"""Trust ratio: an update as long as the weights are, times the learning rate (LAMB, LARS)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Range
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.updates import Update, UpdateTransform

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class TrustRatio(Construct):
    """Multiplies the update of each parameter by `phi(|w|) / |u|`: LAMB over `adamw`, LARS over `sgd`.

    w are the weights before the step and u is what the optimizer subtracts per unit of learning rate, weight decay
    included: `w = w - lr * phi(|w|) / |u| * u`, norms L2 over the whole parameter. phi is the identity, or limits
    |w| to `weight_norm`. The ratio is 1 where phi(|w|) or |u| is 0. Over AdamW, u = m / (sqrt(v) + eps) + decay w
    with both moments corrected for bias: Algorithm 2 of the paper. Over SGD with momentum, u is the momentum of
    g + decay w: LARS as Algorithm 1 of the same paper has it. The first LARS (You et al. 2017) differs: its ratio
    |w| / (|g| + decay |w|) enters the momentum.

    Factors of other `lr` clauses multiply the learning rate as ever. Under a `mask`, w and u are the selected entries.
    Vectors, such as biases and the weights of norm layers, keep their update unless `on` selects them: the authors'
    code leaves out biases and LayerNorm by name, others leave out what has no weight decay, which are the same
    tensors as a rule. Parameters without weight decay are scaled like the others. The published code also
    clips the gradient: write `clip = 1` in the optimizer.

    u is taken from the optimizer itself, not from two rounded weights, so its relative error is that of a number of
    its dtype, 6e-8 in float32, however large the weights are. Only with `optimizer torch(...)` it is the difference
    of the weights, with an error of up to 6e-8 |w| / |lr u| in float32. In steps with a learning rate of 0 no ratio
    is measured.
    """

    cite: ClassVar = (
        "You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,"
        " arXiv:1904.00962"
    )
    usage: ClassVar = "lr trust_ratio { weight_norm = 0..10 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable where ndim >= 2"
    identity: ClassVar = {"limits": "1..1"}
    signals: ClassVar = {
        "mean": "mean ratio over the scaled parameters",
        "lowest": "smallest ratio of a scaled parameter",
        "highest": "largest ratio of a scaled parameter",
    }
    effects: ClassVar = (
        Effect(
            "deltas",
            "scale updates to the norm of the weights",
            ("params", "delta", "rate"),
            ("params", "delta", "metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    weight_norm: Range | None = Field(
        default=None,
        description="limits of |w| in the ratio: phi of the paper. Default: none",
    )
    limits: Range | None = Field(
        default=None,
        description="limits of the ratio itself; `0..1` never lengthens an update. Default: none",
    )

    @field_validator("weight_norm", "limits", mode="after")
    @classmethod
    def _is_not_negative(cls, value: Range | None) -> Range | None:
        if value is not None and value.low < 0:
            raise ValueError(f"a norm and a ratio cannot be negative: {value.low:g}")
        return value

    def ratio(self, weights: float, update: float) -> float:
        """Return the ratio for |w| and |u|."""
        length = weights if self.weight_norm is None else _limit(weights, self.weight_norm)
        found = length / update if length and update else 1.0
        return found if self.limits is None else _limit(found, self.limits)

    def lower(self, to: Lowering) -> None:
        """Scale the updates of the selected parameters."""
        to.delta(Scale(to.label, self), [parameter.name for parameter in to.parameters()])

    def reference(
        self,
        w: Tensor,
        gradients: Sequence[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> Tensor:
        """Return `w` after one LAMB update per gradient, by definition; all of one shape."""
        b1, b2 = betas
        m, v = w.new_zeros(w.shape), w.new_zeros(w.shape)
        for t, g in enumerate(gradients, start=1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps) + weight_decay * w
            w = w - lr * self.ratio(float(w.norm()), float(u.norm())) * u
        return w


def _limit(value: float, limits: Range) -> float:
    return min(max(value, limits.low), limits.high)


@dataclass(eq=False)
class Scale(UpdateTransform):
    """Phase 10: measure the ratios, and multiply the updates by them."""

    name: str
    construct: TrustRatio
    steps: int = 0
    lowest: dict[str, float] = field(default_factory=dict)
    """The smallest ratio of each parameter in the run so far."""
    highest: dict[str, float] = field(default_factory=dict)

    def change(self, updates: Sequence[Update], step: Step) -> None:
        from trainc.kernels.parameter.multi_norm import multi_norm

        moving = [update for update in updates if update.lr]
        by_device: dict[Any, list[Update]] = {}
        for update in moving:
            by_device.setdefault(update.before.device, []).append(update)
        ratios: dict[str, float] = {}
        for same in by_device.values():
            rows = multi_norm([u.before for u in same], [u.change for u in same]).tolist()
            for update, (weights, change, *_) in zip(same, rows, strict=True):
                norm = math.sqrt(change) / update.lr
                ratios[update.name] = self.construct.ratio(math.sqrt(weights), norm)
        for update in moving:
            update.change.mul_(ratios[update.name])
        if ratios:
            self._record({update.name: ratios[update.name] for update in moving}, step)

    def _record(self, ratios: Mapping[str, float], step: Step) -> None:
        low, high = min(ratios.values()), max(ratios.values())
        mean = fmean(ratios.values())
        found = {"mean": mean, "lowest": low, "highest": high}
        named = {f"{self.name}.{signal}": value for signal, value in found.items()}
        step.series[f"{self.name}.ratio"] = dict(ratios)
        step.metrics.update(named)
        step.signals.update(named)
        step.signals[self.name] = mean
        self.steps += 1
        for name, ratio in ratios.items():
            self.lowest[name] = min(ratio, self.lowest.get(name, ratio))
            self.highest[name] = max(ratio, self.highest.get(name, ratio))

    def state_dict(self) -> ActionState:
        if not self.steps:
            return {}
        state: ActionState = {"steps": self.steps}
        state |= {f"lowest/{name}": ratio for name, ratio in self.lowest.items()}
        return state | {f"highest/{name}": ratio for name, ratio in self.highest.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state.get("steps", 0))
        for end, ratios in (("lowest/", self.lowest), ("highest/", self.highest)):
            ratios.clear()
            for key, ratio in state.items():
                if key.startswith(end):
                    ratios[key.removeprefix(end)] = float(ratio)

    def summary(self) -> str | None:
        if not self.steps:
            return f"{self.name}: no update was scaled"
        low = min(self.lowest, key=lambda name: self.lowest[name])
        high = max(self.highest, key=lambda name: self.highest[name])
        return (
            f"{self.name}: ratios from {self.lowest[low]:.3g} ({low}) to {self.highest[high]:.3g} ({high})"
            f" in {self.steps} steps"
        )
