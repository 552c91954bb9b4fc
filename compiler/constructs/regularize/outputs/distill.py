"""Distillation: the model stays near the predictions of a frozen teacher, such as the model at its start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from trainc.compiler.constructs.regularize.outputs import _prefix
from trainc.compiler.constructs.regularize.outputs._divergence import (
    DIRECTIONS,
    Direction,
    counted_rows,
    kl,
    weighted_mean,
)
from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, ImportPath, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward

Reduce = Literal["mean", "sum", "none"]


class Distill(Construct):
    """Adds the divergence between a frozen teacher's predictions and the model's to the loss.

    The teacher is the model as it is before the first step in which the clause acts (after a resume
    the same one), or has other weights of the same model; it runs in evaluation mode and has no
    gradient. With p and q the softmaxes of the teacher's and the model's logits divided by
    `temperature`, the term is `weight * temperature^2` times the mean over the counted targets of
    KL(p || q) (`direction = forward`), of KL(q || p) (`reverse`), or of half their sum (`symmetric`).
    With `top` the divergence is forward and over the teacher's `top` largest classes and the rest of
    its mass as one class, a lower bound.

    With `prefix` the teacher reads these tokens before every sample, and its logits are those at the
    sample's own tokens: the model learns to behave as if it had read them (context distillation). The
    teacher's positions are counted from the prefix on, the model's from 0. Prefix and sample together
    must fit into the model's context. The tokens are ids, or the text of a file by `tokenizer`, as
    `data text` has it: its bytes, or the ids of a function.
    """

    cite: ClassVar = (
        "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, "
        "arXiv:1503.02531; from the start of the training: Li and Hoiem, Learning without "
        "Forgetting, ECCV 2016, arXiv:1606.09282; with a prefix, and the largest classes one by one: Askell et al., A "
        "General Language Assistant as a Laboratory for Alignment, 2021, arXiv:2112.00861"
    )
    usage: ClassVar = "regularize distill { weight = 0.5, temperature = 2 }"
    identity: ClassVar = {"weight": "0"}
    functions: ClassVar = ("trainc.compiler.constructs.regularize.outputs.distill:distill_loss",)
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

    teacher: Literal["start"] | str = Field(
        default="start",
        description="the model at the start, or the folder of another run (what it evaluated with) or .safetensors file"
        " with weights of the same model",
    )
    prefix: str | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        description="what the teacher reads before every sample: a file of text, or ids of tokens. Default: nothing",
    )
    tokenizer: Literal["bytes"] | ImportPath = Field(
        default="bytes",
        description="of the file of `prefix`: `bytes`, or a function from text to ids, as `module:callable`",
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Distill:
        if self.top is not None and self.direction != "forward":
            raise ValueError(
                f"`top` is defined for `direction = forward` alone: remove `top = {self.top}`, or `direction`"
            )
        if self.tokenizer != "bytes" and not isinstance(self.prefix, str):
            raise ValueError(
                "`tokenizer` reads the file of `prefix`: name one, or remove `tokenizer`"
            )
        if self.prefix is not None and not self.prefix:
            raise ValueError("`prefix` is empty: write what the teacher reads first, or remove it")
        return self

    def lower(self, to: Lowering) -> None:
        """Keep the teacher, and add the divergence over the counted targets."""
        weights = None if self.teacher == "start" else self._weights(Path(self.teacher))
        through = self._prefixed(to)
        try:
            teacher = to.companion("teacher", since="from", weights=weights, through=through)
        except ValueError as error:
            if weights is None:
                raise
            raise FieldError("teacher", f"{self.teacher}: {error}") from error

        def value(forward: Forward) -> Tensor:
            return self.reference(
                forward.logits_of(teacher), forward.view(0), forward.target_weights
            )

        to.term(
            value,
            over="targets",
            weight=self.weight,
            companions=[teacher],
            of_classes=True,
            what="divergence from the teacher",
        )

    def _weights(self, source: Path) -> dict[str, Tensor]:
        """Return the weights in a file or of a run; raises FieldError where there are none."""
        from trainc.runtime.storage.saved_weights import read_weights

        try:
            return read_weights(source)
        except (OSError, ValueError) as error:
            raise FieldError("teacher", f"the teacher's weights cannot be read: {error}") from error

    def _prefixed(self, to: Lowering) -> _prefix.Prefixed | None:
        """Return what puts the prefix before the teacher's inputs; raises FieldError for one that does not fit."""
        if self.prefix is None:
            return None
        ids = _prefix.read_prefix(self.prefix, self.tokenizer)
        context, sample = _prefix.context_of(to.model), to.tokens_per_sample or 1
        if context is not None and len(ids) + sample > context:
            raise FieldError("prefix", _prefix.too_long(len(ids), sample, context))
        return _prefix.Prefixed(tuple(ids), context, to.label)

    def reference(self, teacher: Tensor, student: Tensor, weights: Tensor) -> Tensor:
        """Return the divergence of logits (..., classes) times temperature^2, 0-d, in float32 at least.

        It is the mean by the targets' `weights` (...), bool or numbers; without one it is not a number, as the loss is.
        """
        teacher, student = counted_rows(weights, teacher, student)
        each = _divergences(teacher, student, self.top, self.temperature, self.direction)
        return weighted_mean(each, weights)


def distill_loss(
    teacher: Tensor,
    student: Tensor,
    top: int | None = None,
    temperature: float = 1.0,
    direction: Direction = "forward",
    reduce: Reduce = "mean",
) -> Tensor:
    """Return `temperature`^2 times the divergence of the predictions of two models, in float32 at least.

    `teacher` and `student` are logits (..., C) of C classes; the teacher's have no gradient. With p and q the softmaxes
    of the logits divided by `temperature`, it is KL(p || q) for `direction` "forward", KL(q || p) for "reverse" and
    half their sum for "symmetric". With `top`, in the direction "forward" alone, the teacher's `top` largest classes
    count one by one and all others as one class: at most the whole divergence, and equal to it from C - 1 on. `reduce`
    is "mean" over all leading axes, 0-d; "sum" over them; or "none", (...). A class that both mask by -inf adds none.
    Sources: Hinton, Vinyals and Dean 2015; `top`: Askell et al. 2021. Raises ValueError for logits of other shapes, a
    `temperature` of 0 or less, a `top` below 1 or in another direction, and unknown words.
    """
    if teacher.shape != student.shape or not student.dim():
        raise ValueError(
            f"`teacher` has the shape {tuple(teacher.shape)} and `student` {tuple(student.shape)}: expected one shape"
            " (..., classes)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature:g}: expected a number above 0")
    if direction not in ("forward", "reverse", "symmetric"):
        raise ValueError(f"direction = {direction!r}: expected {DIRECTIONS}")
    if top is not None and (top < 1 or direction != "forward"):
        raise ValueError(
            f"top = {top}, direction = {direction!r}: expected 1 or more, and the direction `forward`"
        )
    if reduce not in ("mean", "sum", "none"):
        raise ValueError(f"reduce = {reduce!r}: expected `mean`, `sum` or `none`")
    import torch

    dtype = torch.promote_types(student.dtype, torch.float32)
    fixed, own = teacher.detach().to(dtype), student.to(dtype)
    each = _divergences(fixed, own, top, temperature, direction)
    return each if reduce == "none" else each.mean() if reduce == "mean" else each.sum()


def _divergences(
    teacher: Tensor, student: Tensor, top: int | None, temperature: float, direction: Direction
) -> Tensor:
    """Return the divergence of each row of logits (..., classes), times temperature^2."""
    log_p, log_q = ((one / temperature).log_softmax(-1) for one in (teacher, student))
    if top is not None and top < log_p.shape[-1]:
        log_p, log_q = _top_and_rest(log_p, log_q, top)
    return kl(log_p, log_q, direction) * temperature**2


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
