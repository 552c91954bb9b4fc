"""Add up the micro-batches of a step: losses, loss terms, gradients and statistics, over all replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import (
    require_exchanged,
    require_own_gradients,
)
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.per_example.micro_batch import MicroBatchResult
from trainc.compiler.per_example.statistics import Statistics
from trainc.runtime.run.interface import RunSettings, UnsoundStep
from trainc.runtime.run.skipped_steps import SkippedSteps
from trainc.runtime.soundness.gradient_norm import GradientNorms, read_numbers
from trainc.runtime.soundness.sound import unsound_step
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.step.record import Step
from trainc.runtime.step.replicas import Replicas

_SPREAD = 1e-5
"""How far apart the norms of an exchanged gradient may be on different processes, relative to it."""
_TOLERANCE = 1e-3
"""How far from 1 the sum of a step's loss weights may be: they may have 16 bits."""


def add_results(
    step: Step,
    results: Sequence[MicroBatchResult],
    gradients: GradientNorms,
    statistics: Statistics,
    replicas: Replicas | None,
    others: Sequence[Tensor] = (),
    name_of: Callable[[nn.Parameter], str] = str,
) -> tuple[float, list[float]]:
    """Add what the micro-batches left to the step; with replicas the step is then that of all of them.

    Returns the sum of their loss weights, over replicas the mean of the sums, and the values of `others`.

    Losses, terms, the norms of gradients and `others` are read from the device here, in one transfer.

    Raises SiteError where statistics did not arrive, or where replicas have no gradients of their own, or have not
    exchanged them.
    """
    if of_replicas := statistics.of_replicas:
        require_own_gradients(replicas, results, of_replicas)
    numbers = [*gradients.numbers]
    for result in results:
        numbers += [result.loss, *result.terms.values()]
    numbers += others
    found, at = read_numbers(numbers), len(gradients.numbers)
    step.gradients, step.metrics["gradient_norm"] = gradients, gradients.keep(found[:at])
    for result in results:
        step.loss += found[at]
        for i, name in enumerate(result.terms, start=at + 1):
            step.metrics[name] = step.metrics.get(name, 0.0) + found[i]
        at += 1 + len(result.terms)
    read = found[at:]
    for result in results:
        if result.weights is not None:
            step.contributions.append(statistics.contribution(result))
    weight = sum(result.loss_weight for result in results)
    if replicas is not None:
        weight, spread = _gather(step, replicas, list(results[0].terms), weight)
        if spread > _SPREAD * step.metrics["gradient_norm"]:
            require_exchanged(gradients, name_of, replicas)
    return weight, read


def _gather(
    step: Step, replicas: Replicas, terms: Sequence[str], weight: float
) -> tuple[float, float]:
    """Combine the step over all replicas, so that each has the same numbers and decides the same.

    Losses are means, as gradients are; samples and tokens are sums. Returns the mean of `weight`, and how far apart the
    norms of the gradient are.
    """
    own = {"loss": step.loss, "samples": float(step.samples), "tokens": float(step.tokens)}
    terms = sorted(
        [*terms, "gradient_norm"]
    )  # a replica without targets adds its zeros in another order
    own["square"] = step.metrics["gradient_norm"] ** 2
    own |= {f"term {name}": step.metrics[name] for name in terms} | {"weight": weight}
    step.contributions, means = replicas.gather(step.contributions, own)
    step.loss = means["loss"]
    step.samples, step.tokens = (
        round(means[name] * replicas.size) for name in ("samples", "tokens")
    )
    step.metrics.update({name: means[f"term {name}"] for name in terms})
    spread = means["square"] - step.metrics["gradient_norm"] ** 2
    return means["weight"], math.sqrt(max(spread, 0.0)) if math.isfinite(spread) else 0.0


def weigh_by_gradients(
    results: Sequence[MicroBatchResult],
    scaler: Any,
    statistics: Statistics,
    whole: float = 1.0,
    *,
    alone: bool = True,
) -> None:
    """Weigh micro-batches whose losses a framework multiplied, by what it multiplied them by.

    The gradient that reaches a loss is that factor, times the scale of a GradScaler: where that has unscaled gradients
    before, it is what is left when the factors sum to `whole`, what they are of a whole step. Raises ValueError where
    they do not; of several replicas, which are not `alone`, the mean over all is checked later. Weights are the
    factors, divided by `whole`.
    """
    own = [result for result in results if result.by_framework]
    if not own:
        return
    zero = own[0].loss.new_zeros((), dtype=torch.float64)
    found = [zero if one.loss_scale is None else one.loss_scale.to(zero) for one in own]
    factors: list[float] = torch.stack(found).tolist()
    total = sum(one.loss_weight * factor for one, factor in zip(own, factors, strict=True))
    scale = whole if scaler is None else (scaler.scale or total / whole) * whole
    if alone and not abs(total / scale - 1) < _TOLERANCE:
        raise ValueError(
            f"the losses of this step were multiplied by {total / scale * whole:.4g} in all before their backward"
            f" passes, not by {whole:.4g}: divide each loss by the number of micro-batches in the step, here"
            f" {len(own)}, after the program has it (with Accelerate by its `gradient_accumulation_steps`), and call"
            " `step` after the last of them; a GradScaler must step the optimizer itself, by `scaler.step(optimizer)`"
        )
    for one, factor in zip(own, factors, strict=True):
        one.by_framework, one.loss_scale = False, zero.to(one.loss.dtype) + scale
        if (weight := factor / scale) != 1.0:
            one.loss, one.loss_weight = one.loss * weight, one.loss_weight * weight
            one.terms = {name: value * weight for name, value in one.terms.items()}
            one.example_fraction *= weight
            one.weights = None if one.weights is None else one.weights * weight
            if one.example_weights is not None:
                one.example_weights = one.example_weights * weight
    statistics.scaling.divide(scale)


def describe_unsound(
    step: Step, losses: Losses, method: LoweredMethod, results: Sequence[MicroBatchResult] = ()
) -> str | None:
    """Return what of the step is not finite, with the reason where it is known; None for a sound step."""
    found = unsound_step(step.loss, step.metrics["gradient_norm"])
    if found is None:
        return None
    targets = [result.targets for result in results if result.targets is not None]
    if (
        math.isnan(step.loss)
        and targets
        and not any(p.loss.count_evaluated(p.targets(one)) for p in losses.parts for one in targets)
    ):
        return f"{found}, because no target of the step counts,"
    owner = None if step.gradients is None else step.gradients.first_unsound()
    if math.isfinite(step.loss) and owner is not None:
        return f"{found}, first in `{method.model_gradient.name_of(owner)}`,"
    return found


def check_loss_weights(step: Step, weight: float) -> None:
    """Raise ValueError if the loss weights of the micro-batches do not sum to 1: the step would be of another loss.

    A batch without a target that counts has no mean and no weights; `on_nan` says what is done about its loss.
    """
    if math.isfinite(step.loss) and not abs(weight - 1) < _TOLERANCE:
        raise ValueError(
            f"the loss weights of the step's micro-batches sum to {weight:.4g}, not 1: give each its fraction of the"
            " step's counted targets, `program.loss(batch, loss_weight=...)`, and do not divide the loss yourself; a"
            " loss that is a step of its own needs an `update()` of its own"
        )


def check_example_fractions(results: Sequence[MicroBatchResult]) -> None:
    """Raise ValueError if the example fractions of all micro-batches do not sum to 1."""
    found = sum(result.example_fraction for result in results)
    if abs(found - 1) >= _TOLERANCE:
        raise ValueError(
            f"the example fractions of the step's micro-batches sum to {found:.4g}, not 1: give each its fraction of"
            " the step's examples, `program.loss(batch, loss_weight, example_fraction)`"
        )


def require_train_mode(rewrite: Rewrite, changing: Iterable[str]) -> None:
    """Raise SiteError for a model in eval mode where clauses act in train mode only; `changing` change batches."""
    labels = [site.label for site in rewrite.hooks]
    labels += [*(one.label for one in rewrite.view_requests), *changing]
    if labels or rewrite.measured:
        names = ", ".join(f"`{label}`" for label in dict.fromkeys(labels) if label)
        does = f"{names} would do nothing" if names else "no layer is measured"
        raise SiteError(
            f"the model is in eval mode when a step is run, so {does}: call `model.train()` first, and again after an"
            " evaluation of your own. To train with a part in eval mode, put only that part in eval mode; for a"
            " validation loss call `program.evaluate(inputs, targets)`"
        )


def without_part(total: Tensor, result: MicroBatchResult, *, weighed: bool) -> Tensor:
    """Return the loss of a micro-batch that has no part in its step: a mean over nothing, NaN, times 0 is NaN.

    Where it is not `weighed`, nothing of it is measured; replicas send each other what all of them measure.
    """
    result.loss = torch.zeros_like(result.loss)
    if not weighed:
        result.weights = None
    result.terms = {name: torch.zeros_like(value) for name, value in result.terms.items()}
    return torch.nan_to_num(total, 0.0)


class TermHistory:
    """The loss and its terms at the first step and at the last one, and how many were skipped, for the summary."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.skipped = SkippedSteps()

    def record(self, terms: Mapping[str, float]) -> None:
        """Take the terms of a step."""
        self.last = dict(terms)
        if self.first.keys() != self.last.keys():
            self.first = self.last | self.first

    def ending(
        self, step: Step, scaler: torch.amp.GradScaler | None, settings: RunSettings
    ) -> UnsoundStep | None:
        """Return with what a step that is not sound ends the run; None where it is to be skipped."""
        return None if is_of_scale(step, scaler) else self.skipped.ending(step, settings)

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"first": self.first, "last": self.last, "skipped": self.skipped.state()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self.first, self.last = dict(state["first"]), dict(state["last"])
        self.skipped.restore(state["skipped"])


def usable_scaler(
    scaler: torch.amp.GradScaler, asking: str | None, executor: str
) -> torch.amp.GradScaler | None:
    """Return a scaler, None for one that is disabled; raises ValueError where none can scale the losses.

    That is for an optimizer that is `asking` for them, and in a graph.
    """
    if not scaler.is_enabled():
        return None
    if asking is not None:
        raise ValueError(
            f"`{asking}` asks for the loss and gradients of a step several times, and a GradScaler can skip a step only"
            " as a whole: train in bfloat16 or float32, which need no scaler"
        )
    if executor == "graph":
        raise ValueError(
            "a graph computes gradients of the loss as it is, which a GradScaler cannot scale: compile with"
            ' `executor="module"`, or train in bfloat16, which needs no scaler'
        )
    return scaler


def unscale_gradients(scaler: torch.amp.GradScaler, method: LoweredMethod) -> None:
    """Divide gradients by what the losses were multiplied by; raises ValueError as `require_unscalable`."""
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() and scaler._scale is None:
        raise ValueError(
            "the GradScaler has scaled no loss yet: write `scaler.scale(loss).backward()`, or"
            " `program.backward(loss, scaler=scaler)`"
        )
    require_unscalable(method)
    for action in method.actions:
        if isinstance(action, OptimizerStep):
            scaler.unscale_(action.torch)


def require_unscalable(method: LoweredMethod) -> None:
    """Raise ValueError where a mask keeps gradients where a GradScaler cannot find them."""
    if separate := [name for name, mask in method.masks.items() if mask.separate]:
        names = ", ".join(f"`{name}`" for name in separate)
        raise ValueError(
            f"a GradScaler cannot find the gradients of {names}, which a `mask` clause keeps elsewhere: train in"
            " bfloat16, which needs no scaler, or remove the mask"
        )


def is_of_scale(step: Step, scaler: torch.amp.GradScaler | None) -> bool:
    """Say whether a GradScaler's scale made a step overflow; at 1 or below, it is the gradient itself."""
    scaled = scaler is not None and (step.may_be_unsound or scaler.get_scale() > 1)
    return scaled and (step.may_be_unsound or math.isfinite(step.loss))


def free_gradients(method: LoweredMethod) -> None:
    """Free what the optimizers would have read."""
    for action in method.actions:
        if isinstance(action, OptimizerStep):
            action.zero_grad()
    for mask in method.masks.values():
        mask.discard()
