"""Trust ratio: updates as long as the weights, times the learning rate (LAMB, LARS)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Range
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.updates import Update, UpdateTransform
from trainc.runtime.storage.form import Count, Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class TrustRatio(Construct):
    """Multiplies the update of each parameter by `phi(|w|) / |u|`: LAMB over `adamw`, LARS over `sgd`.

    w are the weights before the step, u is what the optimizer subtracts per unit of learning rate, weight decay
    included: `w = w - lr * phi(|w|) / |u| * u`. Norms are L2 norms over the whole parameter. phi is the identity, or
    limits |w| to `weight_norm`. The ratio is 1 where phi(|w|) or |u| is 0. It is not measured in steps with a rate
    of 0. Factors of other `lr` clauses are part of lr. Under a `mask`, w and u are the selected entries.

    Over AdamW, u = m / (sqrt(v) + eps) + decay w with bias-corrected moments. Over SGD, u is the momentum of
    g + decay w, which is LARS as the LAMB paper writes it. LARS of 2017 is another method: its ratio
    |w| / (|g| + decay |w|) is inside the momentum. The published code also clips gradients: write `clip = 1` in the
    optimizer.

    Vectors (biases, weights of norm layers) keep their update unless `on` selects them. The authors' code leaves out
    biases and LayerNorm by name; later code leaves out parameters without weight decay, which usually are the same.
    Here a selected parameter is scaled with or without weight decay.

    u is what the optimizer computed, not the difference of two rounded weights: its relative error in float32 is
    about 1e-7 for weights of any size. `optimizer torch(...)` can only give the difference. Its error there is up to
    6e-8 |w| / |lr u|, and a note says so.
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


def _norms(updates: Sequence[Update]) -> Iterator[tuple[Update, tuple[float, float]]]:
    """Yield each update with the L2 norms of its weights and of its change, one read for each device."""
    from trainc.kernels.parameter.multi_norm import multi_norm
    from trainc.runtime.processes.sharded import is_sharded, squared_norms

    places: dict[Any, list[Update]] = {}
    for update in updates:
        place = "shards" if is_sharded(update.before) else update.before.device
        places.setdefault(place, []).append(update)
    for place, here in places.items():
        weights, changes = [u.before for u in here], [u.change for u in here]
        if place == "shards":
            found = squared_norms([*weights, *changes]).view(2, -1).T
        else:
            found = multi_norm(weights, changes)[:, :2]
        for update, (weight, change) in zip(here, found.sqrt().tolist(), strict=True):
            yield update, (weight, change)


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
        moving = [update for update in updates if update.lr]
        ratios = {
            update.name: self.construct.ratio(weights, change / update.lr)
            for update, (weights, change) in _norms(moving)
        }
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

    def state_form(self) -> Form:
        return Record({"steps": Count(1)}, more=Number(0))

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
