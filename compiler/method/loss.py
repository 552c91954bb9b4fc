"""The base of losses: a mean over counted targets, and what exact accumulation needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.schedule.clock import Clock

LOSS_WEIGHT = "loss_weight"
"""The name of the 0-d tensor that carries a micro-batch's weight in the loss of its step."""
PARAMETER_WEIGHT = "parameter_weight"
"""The same of terms over parameters, where it is another: each process has the whole gradient of its shards."""
_PREPARED = "prepared:"
"""What stands before the name of a loss in the name of what it has prepared, among the targets of a batch."""
_PLACE = "place:"
"""What stands before the number of a target that had no name, where others stand beside it."""


class LossMismatch(ValueError):
    """A loss cannot be computed from what the model returned and the targets; the message says what to write.

    `label` is the name of the loss, where its `target` is at fault.
    """

    label: str | None = None
    field: str = "target"
    """The field of its clause that is at fault."""


class LossFailed(LossMismatch):
    """A function of the user's own raised an error, which is the cause: it may refuse the targets that it was given."""


class Loss(ABC):
    """A mean over the counted targets of a model's output and targets, without the terms that clauses add.

    It is `sum(w l) / sum(w)` with a loss l and a weight w for each target: `target_weights` gives w, and from it follow
    which targets count, each example's weight, and how micro-batches add up.
    """

    name: str
    output: str | int | None = None
    """What of the model's output it is computed from: a name or an index; None where the output is the logits."""
    target: str | int | None = None
    """What of the batch's targets it is of: a name or an index; None where there is one tensor of them."""
    ignore_index: int = -100
    label_smoothing: float = 0.0
    of_classes: bool = False
    """Whether the targets are classes, by index or probability, and the output their logits."""
    is_cross_entropy: bool = False
    """Whether it may be the plain cross-entropy of class indices, which operators compute with terms of clauses."""

    chunks: int | None = None
    """Into how many parts of rows a graph is to divide its logits, 0 where their size decides; None: they are whole."""

    numbers: Mapping[str, Callable[[Clock], float]] = MappingProxyType({})
    """Its numbers that change in the run, by name."""
    now: Mapping[str, Any] | None = None
    """What these are in the pass that is computed: 0-d tensors, or in an evaluation numbers. None: there are none."""
    companions: tuple[Companion, ...] = ()
    """Modules beside the model that it reads: of each batch it is then given what `prepare` returns, too."""
    linear_head: bool = False
    """Whether a linear layer is the model's head: its results have the classes on the last axis."""

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean, 0-d. Raises LossMismatch where the two do not fit each other."""

    def prepare(self, inputs: Any, targets: Tensor) -> Tensor:
        """Return what it reads of a micro-batch besides, (examples, ...), without gradient.

        It is computed once, before the passes of a step or of an evaluation: from then on the loss is given a pair of
        the targets and this, and before it the targets alone, to count them.
        """
        raise NotImplementedError

    # the model's output

    @property
    def logits_output(self) -> str | int | None:
        """What of a model's output has the logits that clauses read: a name or an index; None where it is they."""
        return self.output

    def read(self, output: Any, inputs: Any) -> Any:
        """Return what it is computed from: its part of the output for these inputs; raises WrongOutput without one."""
        from trainc.runtime.data.batch import extract_logits

        return extract_logits(output, self.output)

    def logits_of(self, output: Any, read: Any) -> Tensor | None:
        """Return the logits that clauses read, of an output and what `read` gave of it; None where there are none."""
        found: Tensor = read
        return found

    def of_views(self, outputs: Any, targets: Any, views: int, mean_loss: bool) -> Tensor:
        """Return the loss of the first view of what was read of an output of all views, or the mean of all views'."""
        return loss_of_views(self, outputs, targets, views, mean_loss)

    @abstractmethod
    def target_weights(self, targets: Tensor) -> Tensor:
        """Return what each target weighs in the mean, 0 where it is ignored: 1 or more axes, examples first."""

    def count(self, targets: Tensor) -> float:
        """Return what the mean is divided by: how many targets count, or the sum of their weights."""
        return float(self.target_weights(targets).double().sum())

    def count_evaluated(self, targets: Any) -> float:
        """Return what the mean of an evaluated batch weighs among those of others."""
        return self.count(targets)

    def weights(self, targets: Tensor) -> Tensor:
        """Return each example's weight in the mean, shape (examples,), float64, sum 1."""
        of_targets = self.target_weights(targets).double()
        own: Tensor = of_targets.reshape(len(of_targets), -1).sum(1)
        return own / own.sum()

    def misfit(self, targets: Tensor) -> str | None:
        """Return what is wrong with floating-point targets by their values, and what to write; None where all fit."""
        return None

    def out_of_range(self, targets: Tensor) -> str | None:
        """Return what is wrong with class indices of which the last output has no class; None where all fit."""
        return None

    def counted(self, targets: Tensor) -> Tensor:
        """Return which targets count, bool."""
        return self.target_weights(targets) > 0

    def weights_for_terms(self, targets: Tensor) -> Tensor:
        """Return what each target weighs in terms over targets, as in the loss, so that both add up: 0 where ignored.

        It is bool where all that count weigh the same.
        """
        return self.counted(targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[float, float]]:
        """Return means that an evaluation reports with the loss, such as `accuracy`, each as a sum and its count."""
        return {}

    def classes_last(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return logits of any number of views as terms read them: with the classes on the last axis."""
        return logits

    def is_cross_entropy_of(self, logits: Tensor, targets: Tensor) -> bool:
        """Say whether of these it is the cross-entropy of class indices along the logits' last axis."""
        return self.is_cross_entropy


def loss_of_views(
    loss: Callable[[Tensor, Tensor], Tensor],
    output: Tensor,
    targets: Tensor,
    views: int,
    mean_loss: bool,
) -> Tensor:
    """Return the loss of the first view of an output (views * B, ...), or the mean of those of all views."""
    from trainc.runtime.data.batch import repeat_views

    if mean_loss:
        return loss(output, repeat_views(targets, views))
    return loss(output if views == 1 else output[: output.shape[0] // views], targets)


class NoLoss(Loss):
    """What a program has whose spec names no loss: a loop of the user's own computes one."""

    name = "none"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise self.missing()

    def target_weights(self, targets: Tensor) -> Tensor:
        raise self.missing()

    def missing(self) -> ValueError:
        """Return the error of whoever needs the spec's loss."""
        return ValueError(
            "the spec has no loss, so only your own code can compute one: write `with program.micro_batch(examples):"
            " loss = ...`, then `program.backward(loss)`; or write a `loss` clause"
        )


def require_loss(loss: Loss) -> None:
    """Raise ValueError where the spec has no loss."""
    if isinstance(loss, NoLoss):
        raise loss.missing()


def with_prepared(targets: Any, prepared: Mapping[str, Tensor]) -> Any:
    """Return targets of a batch with what losses have prepared, by their names; the targets alone without any."""
    if not prepared:
        return targets
    if not isinstance(targets, Mapping):
        several = isinstance(targets, tuple | list)
        places = {f"{_PLACE}{i}": one for i, one in enumerate(targets)} if several else {}
        targets = places or {_PLACE: targets}
    return {**targets, **{_PREPARED + name: one for name, one in prepared.items()}}


def without_prepared(targets: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return targets as the data gave them, and what losses have prepared, by their names."""
    if not isinstance(targets, Mapping):
        return targets, {}
    of = {n.removeprefix(_PREPARED): one for n, one in targets.items() if n.startswith(_PREPARED)}
    own = {name: one for name, one in targets.items() if not name.startswith(_PREPARED)}
    if not of or not all(name.startswith(_PLACE) for name in own):
        return own if of else targets, of
    return own.get(_PLACE, tuple(own.values())), of
