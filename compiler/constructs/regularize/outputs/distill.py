"""Distillation: the model stays near the predictions that it had before the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.regularize.outputs._divergence import (
    Direction,
    counted_mean,
    counted_rows,
    kl,
)
from trainc.dsl.reading.construct import Construct, Effect, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward


class Distill(Construct):
    """Adds the divergence between a frozen teacher's predictions and the model's to the loss.

    The teacher is the model as it is before the first step in which the clause acts (after a resume
    the same one), in evaluation mode and without gradient. With p and q the softmaxes of the
    teacher's and the model's logits divided by `temperature`, the term is `weight * temperature^2`
    times the mean over the counted targets of KL(p || q) (`direction = forward`), of KL(q || p)
    (`reverse`), or of half their sum (`symmetric`). With `top` the divergence is forward and over
    the teacher's `top` largest classes and the rest of its mass as one class, a lower bound.
    """

    cite: ClassVar = (
        "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, "
        "arXiv:1503.02531; from the start of the training: Li and Hoiem, Learning without "
        "Forgetting, ECCV 2016, arXiv:1606.09282"
    )
    usage: ClassVar = "regularize distill { weight = 0.5, temperature = 2 }"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("perturb", "copy the model as the teacher", ("params",)),
        Effect("forward", "compare with the teacher", ("inputs", "forward", "clock"), ("loss",)),
    )

    weight: Schedule = Field(description="coefficient of the divergence")
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="what both logits are divided by; the term is multiplied by its square",
    )
    direction: Direction = Field(
        default="forward",
        description="KL from the teacher to the model, from the model to the teacher, or half of both",
    )
    top: int | None = Field(
        default=None,
        ge=1,
        description="how many of the teacher's classes count one by one; the others count as one class",
    )

    def lower(self, to: Lowering) -> None:
        """Keep the teacher, and add the divergence over the counted targets."""
        if self.top is not None and self.direction != "forward":
            raise ValueError(
                f"`top` is defined for `direction = forward` alone: remove `top = {self.top}`, or `direction`"
            )
        teacher = to.companion("teacher", since="from")

        def value(forward: Forward) -> Tensor:
            return self.reference(forward.logits_of(teacher), forward.view(0), forward.counted)

        to.term(
            value,
            over="targets",
            weight=self.weight,
            companions=[teacher],
            of_classes=True,
            what="divergence from the teacher",
        )

    def reference(self, teacher: Tensor, student: Tensor, counted: Tensor) -> Tensor:
        """Return the divergence of logits (..., classes) times temperature^2, 0-d, in float32 at least.

        It is the mean over the targets `counted` (...), bool; without one it is not a number, as the loss is.
        """
        rows = counted_rows(counted, teacher, student)
        log_p, log_q = ((one / self.temperature).log_softmax(-1) for one in rows)
        if self.top is not None and self.top < log_p.shape[-1]:
            log_p, log_q = _top_and_rest(log_p, log_q, self.top)
        return counted_mean(kl(log_p, log_q, self.direction), counted) * self.temperature**2


def _top_and_rest(log_p: Tensor, log_q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return log probabilities (..., count + 1) of the teacher's largest classes and of all others together."""
    import torch

    largest, index = log_p.topk(count, dim=-1)
    chosen = log_q.gather(-1, index)
    left = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, index, True)
    rest_p, rest_q = (
        log.masked_fill(left, -torch.inf).logsumexp(-1, keepdim=True) for log in (log_p, log_q)
    )
    return torch.cat([largest, rest_p], -1), torch.cat([chosen, rest_q], -1)
