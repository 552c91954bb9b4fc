"""Trust ratio: updates, or gradients, as long as the weights, times the learning rate (LAMB, LARS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, Range
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.gradients import GradientTransform, ParameterGradient
from trainc.runtime.step.updates import Update, UpdateTransform
from trainc.runtime.storage.form import Count, Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step

COEFFICIENTS = {"update": 1.0, "gradient": 0.001}
"""What the ratio is multiplied by where the clause does not say: 1 in LAMB, 0.001 in LARS."""


class TrustRatio(Construct):
    """Multiplies the update of each parameter by `phi(|w|) / |u|`: LAMB over `adamw`; or its gradient, which is LARS.

    With `of = update`, w are the weights before the step and u is what the optimizer subtracts per unit of learning
    rate, weight decay included: `w = w - lr * phi(|w|) / |u| * u`. Norms are L2 norms over the whole parameter. phi is
    the identity, or limits |w| to `weight_norm`. The ratio is 1 where phi(|w|) or |u| is 0. It is not measured in steps
    with a rate of 0. Factors of other `lr` clauses are part of lr. Under a `mask`, w and u are the selected entries.

    Over AdamW, u = m / (sqrt(v) + eps) + decay w with bias-corrected moments. Over SGD, u is the momentum of
    g + decay w, which is LARS as the LAMB paper writes it.

    With `of = gradient` it is LARS of 2017, inside the momentum: the gradient g with its decay is multiplied before the
    optimizer sees it, by `coefficient * phi(|w|) / (|g| + decay |w|)`. That needs an optimizer that adds the decay to
    the gradient, as `sgd` does; over `adamw`, whose updates do not depend on the length of gradients, it would do
    nothing. The gradients that are clipped hold what changes the decay, so that a decay and `clip` are an error.

    Vectors (biases, weights of norm layers) keep their update unless `on` selects them. The authors' code leaves out
    biases and LayerNorm by name; later code leaves out parameters without weight decay, which usually are the same.
    Here a selected parameter is scaled with or without weight decay.

    u is what the optimizer computed, not the difference of two rounded weights: its relative error in float32 is
    about 1e-7 for weights of any size. `optimizer torch(...)` can only give the difference. Its error there is up to
    6e-8 |w| / |lr u|, and a note says so.
    """

    cite: ClassVar = (
        "You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,"
        " arXiv:1904.00962; of gradients: You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks,"
        " 2017, arXiv:1708.03888"
    )
    usage: ClassVar = "lr trust_ratio { weight_norm = 0..10 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable where ndim >= 2"
    identity: ClassVar = {"limits": "1..1"}
    functions: ClassVar = ("trainc.compiler.constructs.lr.trust_ratio:trust_ratio",)
    signals: ClassVar = {
        "mean": "mean ratio over the scaled parameters",
        "lowest": "smallest ratio of a scaled parameter",
        "highest": "largest ratio of a scaled parameter",
    }
    effects: ClassVar = (
        Effect(
            "gradients",
            "scale gradients to the norm of the weights",
            ("params", "gradient"),
            ("gradient", "metrics", *(f"signal:{name}" for name in signals)),
        ),
        Effect(
            "deltas",
            "scale updates to the norm of the weights",
            ("params", "delta", "rate"),
            ("params", "delta", "metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    of: Literal["update", "gradient"] = Field(
        default="update",
        description="what is scaled: the `update` that the optimizer makes (LAMB), or the `gradient` that it is given"
        " (LARS)",
    )
    coefficient: float | None = Field(
        default=None,
        gt=0,
        description="factor of the ratio. Default: 1 of updates, and 0.001 of gradients, as published",
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

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it scales one of the two."""
        return effect.phase == {"update": "deltas", "gradient": "gradients"}[self.of]

    def ratio(self, weights: float, scaled: float) -> float:
        """Return the ratio for |w| and |u|, or |g| + decay |w|."""
        length = weights if self.weight_norm is None else _limit(weights, self.weight_norm)
        by = COEFFICIENTS[self.of] if self.coefficient is None else self.coefficient
        found = by * length / scaled if length and scaled else 1.0
        return found if self.limits is None else _limit(found, self.limits)

    def lower(self, to: Lowering) -> None:
        """Scale the updates or the gradients of the selected parameters."""
        names = [parameter.name for parameter in to.parameters()]
        if self.of == "update":
            to.delta(ScaleUpdates(to.label, self), names)
            return
        for name in names:
            optimizer = to.optimizer_of(name)
            if optimizer is not None and optimizer.decay_form != "coupled":
                raise FieldError(
                    "of",
                    f"`of = gradient` needs an optimizer that adds the weight decay to the gradient, and that of"
                    f" `{name}` does not: use stochastic gradient descent, or `of = update`",
                )
        to.gradient(ScaleGradients(to.label, self), names)

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


def trust_ratio(
    param: Tensor,
    update: Tensor,
    weight_decay: float = 0.0,
    coefficient: float = 1.0,
    weight_norm: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Return the trust ratio `coefficient * phi(|w|) / (|u| + weight_decay * |w|)`, 0-d in float64, without gradient.

    `param` are the weights w, `update` of the same shape what is scaled, u: of LAMB the step per unit of learning rate,
    weight decay included, so that `weight_decay` is 0; of LARS the gradient, with the decay that is added to it. Norms
    are L2 norms over all entries. phi limits |w| to `weight_norm`, (low, high), and is the identity without it; the
    ratio itself is limited to `limits`. It is 1 where phi(|w|) or the divisor is 0, and NaN where a norm is not finite.
    Sources: LAMB, You et al. 2020; LARS, You, Gitman and Ginsburg 2017, with a `coefficient` of 0.001. Raises
    ValueError for tensors of other shapes, for negative numbers, and for limits that are not in order.
    """
    if param.shape != update.shape:
        raise ValueError(
            f"`param` has the shape {tuple(param.shape)} and `update` {tuple(update.shape)}: expected the same shape"
        )
    if not (weight_decay >= 0 and coefficient > 0):
        raise ValueError(
            f"weight_decay = {weight_decay:g}, coefficient = {coefficient:g}: expected 0 or more, and above 0"
        )
    for name, ends in (("weight_norm", weight_norm), ("limits", limits)):
        if ends is not None and not 0 <= ends[0] <= ends[1]:
            raise ValueError(f"{name} = {ends}: expected 0 <= low <= high")
    from trainc.kernels.parameter.multi_norm import multi_norm

    w, u = multi_norm([param], [update])[0, :2].sqrt()
    length = w if weight_norm is None else w.clamp(*weight_norm)
    divisor = u + weight_decay * w
    none = (length == 0) | (divisor == 0)
    found: Tensor = (coefficient * length / divisor).masked_fill(none, 1.0)
    found = found.masked_fill(~(w.isfinite() & u.isfinite()), float("nan"))
    return found if limits is None else found.clamp(*limits)


def _limit(value: float, limits: Range) -> float:
    return min(max(value, limits.low), limits.high)


def _norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Return the L2 norms of pairs of tensors, one read for each device."""
    from trainc.kernels.parameter.multi_norm import multi_norm
    from trainc.runtime.processes.sharded import is_sharded, squared_norms

    places: dict[Any, list[int]] = {}
    for i, (one, _) in enumerate(pairs):
        places.setdefault("shards" if is_sharded(one) else one.device, []).append(i)
    norms: dict[int, tuple[float, float]] = {}
    for place, here in places.items():
        ones, others = [pairs[i][0] for i in here], [pairs[i][1] for i in here]
        sharded = place == "shards"
        both = (
            squared_norms([*ones, *others]).view(2, -1).T if sharded else multi_norm(ones, others)
        )
        found = both[:, :2].sqrt().tolist()
        norms |= {i: (a, b) for i, (a, b) in zip(here, found, strict=True)}
    return [norms[i] for i in range(len(pairs))]


@dataclass(eq=False)
class Ratios:
    """The ratios of a clause in the run so far: what is recorded of them, and their state."""

    name: str
    construct: TrustRatio
    steps: int = 0
    lowest: dict[str, float] = field(default_factory=dict)
    """The smallest ratio of each parameter in the run so far."""
    highest: dict[str, float] = field(default_factory=dict)

    def record(self, ratios: Mapping[str, float], step: Step) -> None:
        """Show the ratios of a step."""
        if not ratios:
            return
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
        what = self.construct.of
        if not self.steps:
            return f"{self.name}: no {what} was scaled"
        low = min(self.lowest, key=lambda name: self.lowest[name])
        high = max(self.highest, key=lambda name: self.highest[name])
        return (
            f"{self.name}: ratios from {self.lowest[low]:.3g} ({low}) to {self.highest[high]:.3g} ({high})"
            f" in {self.steps} steps"
        )


class ScaleUpdates(Ratios, UpdateTransform):
    """Phase 10: measure the ratios, and multiply the updates by them."""

    def change(self, updates: Sequence[Update], step: Step) -> None:
        moving = [update for update in updates if update.lr]
        ratios = {}
        pairs = [(update.before, update.change) for update in moving]
        for update, (weights, change) in zip(moving, _norms(pairs), strict=True):
            ratios[update.name] = self.construct.ratio(weights, change / update.lr)
            update.change.mul_(ratios[update.name])
        self.record(ratios, step)


class ScaleGradients(Ratios, GradientTransform):
    """Phase 8: multiply the gradients by the ratios, with the decay that the optimizer will add to them."""

    takes_shards = True
    coupled = True

    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        ratios = {}
        pairs = [(one.weight, one.gradient) for one in gradients]
        for one, (weights, gradient) in zip(gradients, _norms(pairs), strict=True):
            decay = one.weight_decay
            ratio = self.construct.ratio(weights, gradient + decay * weights)
            ratios[one.name] = ratio
            one.gradient.mul_(ratio)
            if decay:  # the optimizer adds decay * w: the sum is ratio * (g + decay * w)
                one.gradient.add_(one.weight, alpha=(ratio - 1) * decay)
        self.record(ratios, step)
