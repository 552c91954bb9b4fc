"""A function of the user's own as the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.loss._user import UserLossConstruct
from trainc.compiler.method.loss import LossFailed, LossMismatch
from trainc.compiler.method.user_loss import Counting, UserLoss, check_user_loss
from trainc.compiler.model.import_path import ImportProblem, import_callable
from trainc.dsl.reading.construct import ImportPath

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss

Reduction = Literal["mean", "sum", "none"]
SHAPES = {
    "mean": "one number, the mean over what it counts",
    "sum": "one number, the sum over what it counts",
    "none": "a number for each",
}


@dataclass(eq=False)
class FunctionLoss(UserLoss):
    """A function of the model's output and the targets, or the batch, reduced to a mean over what it counts."""

    name = "call"
    path: str
    function: Callable[..., Any]
    reduction: Reduction
    takes: Literal["targets", "batch"]
    counting: Counting | None = None
    ignore_index: int = -100
    may_ignore: bool = False
    logits: str | int | None = None

    def __post_init__(self) -> None:
        if self.reduction != "mean" and self.counting is None:
            self.counting = "examples"

    def read(self, output: Any, inputs: Any) -> Any:
        """Return what the function is called with besides the targets: the output, and with a batch its inputs."""
        from trainc.runtime.data.batch import extract_logits

        part = output if self.output is None else extract_logits(output, self.output)
        return (part, inputs) if self.takes == "batch" else part

    def logits_of(self, output: Any, read: Any) -> Tensor | None:
        if self.logits is None and self.output is not None:
            found: Tensor = read[0] if self.takes == "batch" else read
            return found
        return super().logits_of(output, read)

    @property
    def logits_output(self) -> str | int | None:
        return self.output if self.logits is None else self.logits

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        import torch

        given = outputs, targets
        if self.takes == "batch":
            given = outputs[0], (outputs[1], targets)
        if torch.compiler.is_compiling():  # what a capture cannot do is no mistake of the function
            value = self.function(*given)
        else:
            try:
                value = self.function(*given)
            except LossMismatch:
                raise
            except Exception as error:
                reason = (str(error).strip() or "no message").splitlines()[0]
                raise LossFailed(
                    f"`{self.path}` fails: {type(error).__name__}: {reason}"
                ) from error
        return self._mean(check_user_loss(value, f"what `{self.path}` returned"), targets)

    def _mean(self, value: Tensor, targets: Any) -> Tensor:
        """Return the mean of what the function returned; raises LossMismatch where it has another form."""
        if self.reduction == "mean" and not value.dim():
            return value
        wanted = "[]"
        if self.reduction != "mean":
            weights = self.target_weights(targets)
            if self.reduction == "sum" and not value.dim():
                return value / weights.to(value.dtype).sum()
            if self.reduction == "none" and value.shape == weights.shape:
                kept = weights > 0
                return value.where(kept, 0.0).sum() / kept.sum()
            wanted = f"{[*weights.shape]}" if self.reduction == "none" else wanted
        raise LossMismatch(
            f"`{self.path}` returned the shape {list(value.shape)}, and by `reduction = {self.reduction}` it has to"
            f" return {SHAPES[self.reduction]}, {wanted}: {self._instead(value)}"
        )

    def _instead(self, value: Tensor) -> str:
        if not value.dim():
            return "write `reduction = mean`, or `reduction = sum`"
        if self.reduction != "none":
            return "reduce it, such as by `.mean()`; or write `reduction = none`"
        other = "targets" if self.counting == "examples" else "examples"
        return f"write `counted = {other}` if it has a number for each of them, or let it return this shape"

    def of_views(self, outputs: Any, targets: Any, views: int, mean_loss: bool) -> Tensor:
        """Return the loss of the first view of an output, or of all; its tensors have the views on their first axis."""
        from trainc.runtime.data.batch import one_of, repeat_views

        if views == 1 or mean_loss:
            return self(outputs, repeat_views(targets, views))
        rows = len(one_of(targets))
        return self(_first_rows(outputs, rows, rows * views), targets)


def _first_rows(outputs: Any, rows: int, of: int) -> Any:
    """Return the first rows of all tensors in an output; raises LossMismatch where it holds others."""
    import torch
    from torch.utils import _pytree as pytree

    def first(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == of:
            return leaf[:rows]
        if isinstance(leaf, str | int | float | None):
            return leaf
        raise LossMismatch(
            "a clause passes every example several times and trains the loss of the first pass, and the output of the"
            f" model holds {_form(leaf)}, which cannot be divided into passes: write in the `loss call` clause which"
            ' part of the output it is of, such as `output = "logits"`'
        )

    return pytree.tree_map(
        first, dict(outputs) if isinstance(outputs, Mapping) and not _known(outputs) else outputs
    )


def _known(outputs: Any) -> bool:
    from torch.utils import _pytree as pytree

    return type(outputs) in pytree.SUPPORTED_NODES


def _form(leaf: Any) -> str:
    shape = getattr(leaf, "shape", None)
    return f"a {type(leaf).__name__}" if shape is None else f"a tensor {list(shape)}"


class LossFunction(UserLossConstruct):
    """Trains on what the function `module:callable` computes; other fields are its keyword arguments.

    It is called as `function(outputs, targets)`: with what the model returned, or the part of it that `output` names,
    and with the targets as the data gives them, or those that `target` names. With `takes = batch` it is called as
    `function(outputs, (inputs, targets))`.

    What is trained is always a mean over the whole step, however it is divided into micro-batches; `reduction` says
    what the function returns of a micro-batch. `mean` is the mean over what it counts, and `sum` the sum, which is then
    divided by their number: both are one number. `none` is a number for each, of the shape (B,) for `counted =
    examples`, and of the targets' shape for targets: ignored ones are left out here.

    `counted` says what counts: `examples`, unless it is written; with `reduction = mean` it is found, or confirmed,
    where a step has several micro-batches or measures examples. There the first batch is tried in a few passes of two
    or three examples. Where the function refuses a target that is no class it ignores none: if each example has one,
    all of them count; if it has several, `counted` has to be written. A loss that is no mean over what it counts, such
    as one that compares examples with each other, is refused there.

    The function is part of the captured graph. Where it cannot be captured, as one that reads numbers with `.item()`,
    the modules run, and say why. It must compute with torch, and its result must have a gradient.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'loss call("torch.nn.functional:cross_entropy") { label_smoothing = 0.1 }'
    open_fields: ClassVar = True

    path: ImportPath = Field(description="what to import, as `module:callable`")
    reduction: Reduction = Field(
        default="mean", description="what the function returns: a mean, a sum, or a number for each"
    )
    takes: Literal["targets", "batch"] = Field(
        default="targets", description="what the function is given besides the output"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the function"
    )

    def make_loss(self) -> Loss:
        function = import_callable(self.path)
        try:
            inspect.signature(function).bind(None, None, **self.arguments)
        except TypeError as error:
            raise ImportProblem(
                "wrong-argument",
                f"`{self.path}` cannot be called with an output, {self.takes} and these arguments: {error}",
                f"it is called as `{self.path.attribute}(outputs, {self.takes})`, with the other fields of the clause"
                " as keyword arguments",
                field=next((n for n in self.arguments if f"'{n}'" in str(error)), "path"),
            ) from error
        except ValueError:  # no signature is known: the first call tells
            pass
        called = partial(function, **self.arguments) if self.arguments else function
        return FunctionLoss(
            f"{self.path.module}:{self.path.attribute}",
            called,
            self.reduction,
            self.takes,
            self.counted,
            self.ignore_index,
            self.may_ignore,
            self.logits,
        )

    def reference(self, outputs: Any, targets: Any) -> Any:
        """Return the loss by definition: the function's."""
        return import_callable(self.path)(outputs, targets, **self.arguments)
