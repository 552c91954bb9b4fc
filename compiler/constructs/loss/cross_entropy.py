"""Cross-entropy: the loss of classifiers and language models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.loss._base import LossConstruct
from trainc.compiler.method.loss import Loss, LossMismatch
from trainc.dsl.reading.construct import Proportion
from trainc.dsl.values.value_json import Number

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.schedule.clock import Clock

ClassAxis = Literal["last", 1]


@dataclass(eq=False)
class CrossEntropyLoss(Loss):
    """Mean of -log softmax(logits)[target] over the targets that are not `ignore_index`.

    logits (B, ..., classes) or (B, classes, ...); targets (B, ...) int64, or probabilities of the logits' shape.
    Equal to torch.nn.functional.cross_entropy bit for bit.
    """

    name = "cross_entropy"
    of_classes = True
    ignore_index: int = -100
    label_smoothing: float = 0.0
    class_axis: ClassAxis | None = None
    class_weight: tuple[float, ...] | None = None
    chunks: int | None = None
    _found: dict[int, ClassAxis] = field(default_factory=dict, init=False, repr=False)
    """The axis that the first batch had, by the number of the logits' axes, where no field says it."""
    _classes: int | None = field(default=None, init=False, repr=False)
    """How many classes the last logits had."""

    def __post_init__(self) -> None:
        self.is_cross_entropy = self.class_axis != 1 and self.class_weight is None

    def is_cross_entropy_of(self, logits: Tensor, targets: Tensor) -> bool:
        """Say whether the targets are class indices, and the classes on the last axis."""
        plain = self.is_cross_entropy and str(targets.dtype) == "torch.int64"
        return plain and self._axis(logits, targets) == "last"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        logits = outputs
        if self._axis(logits, targets) == "last" and logits.dim() != 2:
            logits = logits.reshape(-1, logits.shape[-1])
            targets = targets.reshape(logits.shape if targets.is_floating_point() else -1)
        smoothed: Callable[..., Tensor] = partial(
            cross_entropy,
            logits,
            targets,
            weight=None if self.class_weight is None else self._class_weight(logits),
            ignore_index=self.ignore_index,
        )
        smoothing = self.label_smoothing if self.now is None else self.now["label_smoothing"]
        if isinstance(smoothing, float):
            return smoothed(label_smoothing=smoothing)
        hard, uniform = smoothed(), smoothed(label_smoothing=1.0)
        mixed: Tensor = hard + smoothing * (uniform - hard)
        return mixed

    def _class_weight(self, logits: Tensor) -> Tensor:
        """Return the weights of the classes, which are on axis 1 of the logits."""
        import torch

        assert self.class_weight is not None
        if len(self.class_weight) != logits.shape[1]:
            raise LossMismatch(
                f"`class_weight` has {len(self.class_weight)} numbers, and the logits have {logits.shape[1]} classes:"
                " give one number for each class"
            )
        return torch.tensor(self.class_weight, dtype=logits.dtype, device=logits.device)

    # which axis

    def classes_last(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the logits with the classes on the last axis."""
        return logits if self._axis(logits, targets) == "last" else logits.movedim(1, -1)

    def _axis(self, logits: Tensor, targets: Tensor) -> ClassAxis:
        """Return which axis of the logits has the classes; raises LossMismatch where it is none, or may be two."""
        self._check_dtype(targets)
        axis: ClassAxis | None = self.class_axis or self._found.get(logits.dim())
        shape, own = list(logits.shape[1:]), list(targets.shape[1:])
        soft = targets.is_floating_point()
        fitting: list[ClassAxis] = []
        if targets.dim() == logits.dim() - (not soft) and logits.dim() > 1:
            if own == (shape if soft else shape[:-1]):
                fitting.append("last")
            if logits.dim() > 2 and own == (shape if soft else shape[1:]):
                fitting.append(1)
        if axis == 1 and logits.dim() == 2:
            axis = "last"
        if axis is None and len(fitting) == 2 and self.linear_head and logits.stride(-1) == 1:
            axis = "last"  # what a linear head gives has its classes there, unless it was transposed since
        if axis not in fitting:
            if len(fitting) != 1 or self.class_axis is not None:
                raise LossMismatch(self._mismatch(logits, targets, fitting))
            axis = fitting[0]
        self._keep(logits, axis)
        return axis

    def _keep(self, logits: Tensor, axis: ClassAxis) -> None:
        """Remember an axis, so that a later batch whose sizes happen to be equal is read in the same way."""
        import torch

        if not torch.compiler.is_compiling():
            self._found[logits.dim()] = axis
            classes = logits.shape[-1 if axis == "last" else 1]
            self._classes = classes if type(classes) is int else self._classes

    def _mismatch(self, logits: Tensor, targets: Tensor, fitting: list[ClassAxis]) -> str:
        given = f"logits {list(logits.shape)} and targets {list(targets.shape)}"
        if len(fitting) == 2:
            return (
                f"{given} fit two readings: write `class_axis = last` in the `loss` clause if the classes are on the"
                " last axis of the logits, or `class_axis = 1` if they are on the second, as in torch"
            )
        if fitting:
            other = fitting[0]
            return f"{given} do not fit `class_axis = {self.class_axis}`: write `class_axis = {other}`, or remove it"
        if targets.shape[1:] == logits.shape[1:] and not targets.is_floating_point():
            return (
                f"{given} do not fit: targets that are integers are class indices. Of one-hot targets give the"
                " indices, `targets.argmax(-1)`, or probabilities, `targets.float()`"
            )
        if targets.is_floating_point():
            return (
                f"{given} do not fit: floating-point targets are probabilities of classes, and need the shape of the"
                " logits. Give class indices as int64"
            )
        if self.class_axis is not None:
            axis = "the last axis" if self.class_axis == "last" else "axis 1"
            return f"{given} do not fit: the targets need the shape of the logits without {axis}"
        return (
            f"{given} do not fit: the targets need the shape of the logits without the axis of the classes, which is"
            " the last one or axis 1"
        )

    def _check_dtype(self, targets: Tensor) -> None:
        import torch

        if targets.is_floating_point():
            if self.ignore_index != -100:
                raise LossMismatch(
                    "`ignore_index` is for class indices, and the targets are probabilities of classes: remove it"
                )
        elif targets.dtype not in (torch.int64, torch.uint8):
            raise LossMismatch(
                f"class indices must be int64, and the targets are {str(targets.dtype).removeprefix('torch.')}: give"
                " `targets.long()`"
            )

    # what counts

    def target_weights(self, targets: Tensor) -> Tensor:
        """Return the weight of each target's class, 1 unless classes have weights; of probabilities it is 1."""
        import torch

        if targets.is_floating_point():
            if targets.dim() < 2:
                raise LossMismatch(
                    f"the targets {list(targets.shape)} are floating-point numbers with one axis, and probabilities of"
                    " classes have two or more: give class indices as int64, `targets.long()`"
                )
            classes = 1 if self.class_axis == 1 else -1
            return torch.ones_like(targets.select(classes, 0), dtype=torch.float64)
        kept = self.counted(targets)
        if self.class_weight is None:
            return kept
        of_classes = torch.tensor(self.class_weight, dtype=torch.float64, device=targets.device)
        try:
            return of_classes[targets.where(kept, 0).long()] * kept
        except IndexError:
            raise LossMismatch(
                f"`class_weight` has {len(of_classes)} numbers, and a target is the class {int(targets.max())}: give"
                " one number for each class"
            ) from None

    def misfit(self, targets: Tensor) -> str | None:
        """Return what to write where targets are no probabilities of classes."""
        if not (targets.is_floating_point() and targets.dim() > 1 and targets.numel()):
            return None
        low, found = float(targets.min()), targets.double().sum(self._class_axis_of(targets))
        worst = float(found.flatten()[(found - 1).abs().argmax()])
        near = 0.1 if targets.dtype.itemsize == 2 else 0.01
        if (low >= 0 and abs(worst - 1) <= near) or not math.isfinite(worst):
            return None
        what = f"sum to {worst:.4g}" if low >= 0 else f"have the value {low:.4g}"
        return (
            f"floating-point targets are probabilities of classes, and those of a target {what}: they must be 0 or more"
            " and sum to 1, as by `targets / targets.sum(-1, keepdim=True)`. For labels of which several may be true"
            " write `loss bce`"
        )

    def _class_axis_of(self, targets: Tensor) -> int:
        """Return the axis of the classes in probabilities."""
        return 1 if (self.class_axis or self._found.get(targets.dim())) == 1 else -1

    def out_of_range(self, targets: Tensor) -> str | None:
        """Return what to write where a class index is none of the last logits' classes."""
        if targets.is_floating_point() or self._classes is None:
            return None
        counted = targets[self.counted(targets)]
        wrong = counted[(counted < 0) | (counted >= self._classes)]
        if not len(wrong):
            return None
        return (
            f"a target is the class {int(wrong[0])}, and the model's output has {self._classes} classes, from 0 to"
            f" {self._classes - 1}: give the model an output for every class, or mark targets that are to be left out"
            f" by `ignore_index`, which is {self.ignore_index}"
        )

    def counted(self, targets: Tensor) -> Tensor:
        """Return which targets are not ignored, bool."""
        if targets.is_floating_point():
            return self.target_weights(targets) > 0
        return targets != self.ignore_index

    def weights_for_terms(self, targets: Tensor) -> Tensor:
        """Return the weight of each target's class."""
        weighted = self.class_weight is not None and not targets.is_floating_point()
        return self.target_weights(targets) if weighted else self.counted(targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[float, float]]:
        """Return how many of the counted targets were predicted, as `accuracy`."""
        counted, logits = self.counted(targets), self.classes_last(outputs, targets)
        if targets.is_floating_point():
            targets = self.classes_last(targets, targets).argmax(-1)
        right = (logits.argmax(-1) == targets) & counted
        return {"accuracy": (float(right.sum()), float(counted.sum()))}


class CrossEntropy(LossConstruct):
    """Trains on the mean of `-log softmax(logits)[target]` over all targets that are not ignored.

    The mean is over the targets of the whole step, however they are divided into micro-batches. The
    logits are (B, ..., classes) or, as in torch, (B, classes, ...), and the targets (B, ...) int64:
    the shapes tell which; where they fit both, a linear head does, and else `class_axis` must.
    Floating-point targets of the logits' shape are probabilities of the classes. With `class_weight`
    a target counts as often as its class weighs: the mean is divided by the sum of the weights, as in
    torch. The label smoothing may be a schedule, also in evaluations.

    With `chunks` the step runs as a graph, in which the pass `fuse_head` lets one operator compute
    the head's product, the loss and its gradients, chunk by chunk. It acts where a linear layer gives
    the logits and the loss alone reads them; the plan lists the operator, and a run says where it
    does not act. Modules, such as those under DistributedDataParallel or FSDP2, hold all logits, and
    so does the one comparison of a new graph with the modules.
    """

    cite: ClassVar = "Good, J. R. Stat. Soc. B 14 (1952) 107: the logarithmic score"
    usage: ClassVar = "loss cross_entropy { label_smoothing = 0.1 }"
    evaluated: ClassVar = ("accuracy",)

    ignore_index: int = Field(default=-100, description="target value that is left out of the loss")
    label_smoothing: Proportion = Field(
        default=Number(0.0),
        description="weight of the uniform distribution mixed into the target, in [0, 1]",
    )
    class_axis: ClassAxis | None = Field(
        default=None,
        description="axis of the logits that has the classes; needed where the shapes do not tell",
    )
    class_weight: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None, description="weight of each class, torch's `weight`"
    )
    chunks: Literal["off", "auto"] | Annotated[int, Field(ge=1)] = Field(
        default="off",
        description="number of parts of rows that pass the head and the loss one after another, so that the logits"
        " of a large vocabulary are never held at once; `auto`: by their size",
    )

    @field_validator("chunks", mode="before")
    @classmethod
    def _chunks_are_parts(cls, value: Any) -> Any:
        if value not in ("off", "auto") and not (type(value) is int and value >= 1):
            raise ValueError("expected `off`, `auto`, or a whole number of parts, 1 or more")
        return value

    @model_validator(mode="after")
    def _chunks_fit(self) -> Self:
        for name, given in (("class_weight", self.class_weight), ("class_axis", self.class_axis)):
            if self.chunks != "off" and given not in (None, "last"):
                raise ValueError(
                    f"`chunks` is for classes on the last axis that weigh the same: remove it, or `{name}`"
                )
        return self

    @property
    def smoothing(self) -> float:
        """The label smoothing where it is one number; 0 where it is a schedule."""
        constant = self.label_smoothing
        return float(constant.value) if isinstance(constant, Number) else 0.0

    def numbers(self, to: Lowering) -> Mapping[str, Callable[[Clock], float]]:
        """Return the label smoothing where it changes."""
        if to.is_constant(self.label_smoothing):
            return {}
        return {"label_smoothing": to.schedule(self.label_smoothing)}

    def make_loss(self) -> Loss:
        return CrossEntropyLoss(
            self.ignore_index,
            self.smoothing,
            self.class_axis,
            self.class_weight,
            None if self.chunks == "off" else 0 if self.chunks == "auto" else self.chunks,
        )

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; logits (..., classes), targets (...) or probabilities (..., classes)."""
        rows = outputs.reshape(-1, outputs.shape[-1])
        classes = rows.shape[1]
        if targets.is_floating_point():
            p = targets.reshape(-1, classes)
        else:
            flat = targets.reshape(-1)
            rows, flat = (t[flat != self.ignore_index] for t in (rows, flat))
            p = rows.new_zeros(rows.shape)
            p[range(len(flat)), flat] = 1
        weight = rows.new_tensor(self.class_weight or [1.0] * classes)
        log_p = rows - rows.logsumexp(1, keepdim=True)
        smooth = (1 - self.smoothing) * p + self.smoothing / classes
        count = len(p) if targets.is_floating_point() else (p * weight).sum()
        return -(weight * smooth * log_p).sum() / count
