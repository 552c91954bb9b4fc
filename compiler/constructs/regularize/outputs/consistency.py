"""Consistency: outputs stay near those of a second pass, an average of the weights, the start, or the last visit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from trainc.compiler.constructs.regularize.outputs import _two_views
from trainc.compiler.constructs.regularize.outputs._divergence import (
    Direction,
    counted_rows,
    jensen_shannon,
    kl,
    weighted_mean,
)
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.dsl.values.value_json import Number
from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.lowered_method import Scheduled
    from trainc.compiler.method.term import Forward
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.step.record import Step

_VIEWS = _two_views.two_views("pass two views with dropout of their own")
_COPY = Effect("perturb", "copy the model as the target", ("params",))
_COMPARE = Effect(
    "forward", "compare with the target's outputs", ("inputs", "forward", "clock"), ("loss",)
)
_KEEP = Effect("observe", "keep the logits of every sample", ("forward",), ("metrics",))
_FOLLOW = Effect(
    "observe", "move the target towards the weights", ("params", "clock"), ("metrics",)
)


class Consistency(Construct):
    """Adds `weight` times the distance of the model's outputs from a target's to the loss.

    The target is a second pass of the same examples with dropout of its own (`view`: the loss is that of the first
    pass); an average of the weights, e <- d e + (1 - d) w after every step (`ema`: Mean Teacher); the model as it is
    before the first step in which the clause acts (`start`); or the outputs that the sample had when it was last seen
    (`history`: none at first, which adds 0). Averages begin as a copy like that of the start; both run in evaluation
    mode on the same inputs. Only the second pass has a gradient. With `every 10 steps` an average is updated, and
    outputs are kept, in these steps. Those of a history are kept in 16 bits, by sample ids: a loop of your own gives
    these to `program.step`.

    With a the target's logits, b the model's, p and q their softmaxes, the distance of one target is, summed over the
    classes (or with `reduction = mean` divided by their number), (a - b)^2 (`mse`, or with `space = probabilities` (p -
    q)^2); KL(p || q) (`kl`, `forward`), KL(q || p) (`reverse`) or half of both (`symmetric`); or (KL(p || m) + KL(q ||
    m)) / 2 with m = (p + q) / 2 (`js`, at most ln 2). The term is its mean over the targets that the loss counts,
    weighed as there, or with `over = examples` over all, also those without a label. Of a loss that is of no classes it
    is a mean over all.

    UDA is `{ measure = kl, confidence = 0.8, sharpen = 0.4 }`, FixMatch `{ measure = kl, confidence = 0.95, sharpen =
    0 }`, without their second stream of augmented inputs. Mean Teacher's ramp is `weight = 100 * warmup(over =
    20%)`, with `measure = mse, space = probabilities, reduction = mean`.
    """

    cite: ClassVar = (
        "Laine and Aila, Temporal Ensembling, ICLR 2017, arXiv:1610.02242 (two views); Tarvainen and Valpola, Mean "
        "teachers are better role models, NeurIPS 2017, arXiv:1703.01780; Xie et al., Unsupervised Data Augmentation, "
        "NeurIPS 2020, arXiv:1904.12848; Sohn et al., FixMatch, NeurIPS 2020, arXiv:2001.07685"
    )
    usage: ClassVar = (
        "regularize consistency { target = ema, decay = 0.99, weight = 0.5, space = probabilities }"
    )
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (_COPY, _VIEWS, _COMPARE, _KEEP, _FOLLOW)

    target: Literal["view", "ema", "start", "history"] = Field(
        description="what the outputs are compared with: a second pass, an average of the weights, the start, or the"
        " sample's last outputs"
    )
    weight: Schedule = Field(description="coefficient of the distance in the loss")
    measure: Literal["mse", "kl", "js"] = Field(
        default="mse", description="squared distance, KL divergence, or Jensen-Shannon divergence"
    )
    space: Literal["logits", "probabilities"] | None = Field(
        default=None,
        description="what `mse` compares. Default: logits for `mse`; divergences are of probabilities",
    )
    direction: Direction | None = Field(
        default=None,
        description="of `kl`: from the target to the model, from the model to the target, or half of both. Default:"
        " forward",
    )
    reduction: Literal["sum", "mean"] = Field(
        default="sum", description="whether the classes of one target are summed or averaged"
    )
    over: Literal["targets", "examples"] = Field(
        default="targets",
        description="whether the mean is over the targets that the loss counts, or over all of all examples",
    )
    detach: bool | None = Field(
        default=None,
        description="whether the target has no gradient. Default: false for `view`; the others never have one",
    )
    decay: Schedule | None = Field(
        default=None,
        description="of `ema`: how much of the average an update keeps, 0 or more, below 1. Default: 0.999",
    )
    confidence: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="compare only where the target's largest probability is at least this; others count as 0",
    )
    sharpen: float = Field(
        default=1.0,
        ge=0,
        description="what the target's logits are divided by, after `confidence`; 0 makes its largest class the label",
    )

    max_table: float | None = Field(
        default=None, gt=0, description="of `history`: its largest table, in GiB. Default: 4"
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Consistency:
        divergence = self.measure != "mse"
        if divergence and self.space == "logits":
            raise ValueError(
                f"`measure = {self.measure}` is of probabilities: remove `space = logits`"
            )
        if self.direction is not None and self.measure != "kl":
            raise ValueError(
                f"`direction` needs `measure = kl`, not `{self.measure}`: remove `direction`"
            )
        if self.decay is not None and self.target != "ema":
            raise ValueError(f"`decay` needs `target = ema`, not `{self.target}`: remove `decay`")
        if self.max_table is not None and self.target != "history":
            raise ValueError(
                f"`max_table` needs `target = history`, not `{self.target}`: remove `max_table`"
            )
        if isinstance(self.decay, Number) and self.decay.value >= 1:
            raise ValueError("`decay` must be below 1: with 1 the average would never change")
        if self.detach is False and self.target != "view":
            raise ValueError(f"`target = {self.target}` has no gradient: remove `detach = false`")
        if self.sharpen != 1 and not self.of_probabilities:
            raise ValueError(
                "`sharpen` changes the target's probabilities: write `space = probabilities`, or remove it"
            )
        if self.sharpen != 1 and self.target == "view" and not self.detach:
            raise ValueError("`sharpen` makes a label of the target's outputs: add `detach = true`")
        return self

    @property
    def of_probabilities(self) -> bool:
        """Whether probabilities are compared, not logits."""
        return self.measure != "mse" or self.space == "probabilities"

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause has an effect, by its target."""
        return effect in _EFFECTS[self.target]

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn where two passes are equal because no layer is a Dropout."""
        if self.target == "view":
            yield from _two_views.no_dropout(bound)

    def lower(self, to: Lowering) -> None:
        """Make the target, and add the distance from it."""
        companions, histories = [], []
        if self.target == "view":
            to.views(2, share_dropout=False)
        elif self.target == "history":
            limit = 4.0 if self.max_table is None else self.max_table
            histories.append(to.history(limit, "target", "use `target = ema`"))
        else:
            companions.append(to.companion("target", since="from"))
        if self.target == "ema":
            decay = Number(0.999) if self.decay is None else self.decay
            to.action(Follow(to.label, companions[0], to.schedule(decay)))

        def value(forward: Forward) -> Tensor:
            known = None
            if histories:
                other, known = forward.previous(histories[0])
            else:
                other = forward.logits_of(companions[0]) if companions else forward.view(1)
            return self.reference(other, forward.view(0), self._rows(forward), known)

        to.term(
            value,
            over=self.over,
            weight=self.weight,
            companions=companions,
            histories=histories,
            of_classes=self.of_probabilities,
            what=f"distance from {_OTHER[self.target]}",
        )

    def _rows(self, forward: Forward) -> Tensor | None:
        """Return what each row of the logits weighs; None where all weigh the same."""
        weights = forward.target_weights
        fits = weights.shape == forward.view(0).shape[:-1]
        return weights if fits and self.over == "targets" else None

    def reference(
        self,
        target: Tensor,
        own: Tensor,
        weights: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Return the mean distance of logits (..., classes) by the targets' `weights` (...), or over all.

        It is 0-d, in float32 at least; without a target it is not a number, as the loss is. Of an example that is not
        `known` (B,) it is 0.
        """
        import torch

        if self.detach or self.target != "view":
            target = target.detach()
        if own.dim() == 1:
            target, own = target.unsqueeze(-1), own.unsqueeze(-1)
        if weights is None:
            weights = torch.ones(own.shape[:-1], dtype=torch.bool, device=own.device)
        target, own = counted_rows(weights, target, own)
        each = self._distance(target, own)
        if self.confidence is not None:
            each = each.where(target.softmax(-1).amax(-1) >= self.confidence, 0.0)
        if known is not None:
            each = each.where(known.view(-1, *[1] * (each.dim() - 1)), 0.0)
        mean = weighted_mean(each, weights)
        return mean / own.shape[-1] if self.reduction == "mean" else mean

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each row's logits, summed over the classes."""
        if not self.of_probabilities:
            masked = a.isneginf() & b.isneginf()
            return (a - b).masked_fill(masked, 0.0).square().sum(-1)
        log_p, log_q = self._sharpened(a), b.log_softmax(-1)
        if self.measure == "mse":
            return (log_p.exp() - log_q.exp()).square().sum(-1)
        if self.measure == "js":
            return jensen_shannon(log_p, log_q)
        return kl(log_p, log_q, self.direction or "forward")

    def _sharpened(self, a: Tensor) -> Tensor:
        """Return the target's log probabilities."""
        if self.sharpen == 0:
            import torch

            label = torch.zeros_like(a, dtype=torch.bool).scatter(-1, a.argmax(-1, True), True)
            return torch.zeros_like(a).masked_fill(~label, -torch.inf)
        return (a if self.sharpen == 1 else a / self.sharpen).log_softmax(-1)


_OTHER = {
    "view": "the second view",
    "ema": "the average of the weights",
    "start": "the start",
    "history": "the sample's last outputs",
}
_EFFECTS = {
    "view": (_VIEWS,),
    "ema": (_COPY, _COMPARE, _FOLLOW),
    "start": (_COPY, _COMPARE),
    "history": (_COMPARE, _KEEP),
}


class Follow(Action):
    """Phase 12: moves the average towards the weights; saved buffers are averaged, counters copied."""

    phase = Phase.OBSERVE

    def __init__(self, name: str, held: Companion, decay: Scheduled) -> None:
        self.name, self.held, self.decay = name, held, decay

    def run(self, step: Step) -> None:
        decay = self.decay(step.clock)
        if decay > 1:
            raise ValueError(
                f"{self.name}: the decay is {decay:g} at step {step.clock.steps}: expected 0 or more, at most 1"
            )
        self.held.follow(decay)
        step.metrics[f"{self.name}.decay"] = decay
