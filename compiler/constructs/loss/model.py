"""The model's own loss: what a model returns that is given its labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.loss._user import UserLossConstruct
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.method.user_loss import Counting, UserLoss, check_user_loss

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss

LABELS = "labels"
Name = Annotated[str, Field(min_length=1)]


@dataclass(eq=False)
class ModelLoss(UserLoss):
    """The number that the model returns as its loss; a mean over targets, which the model is given as keywords."""

    name = "model"
    in_model = True
    labels: tuple[str, ...] | None
    counting: Counting | None = None
    ignore_index: int = -100
    may_ignore: bool = False
    logits: str | int | None = None
    _seen: set[tuple[str, ...]] = field(default_factory=set, init=False, repr=False)
    """The keywords that the model was found to take."""
    _whole: bool = field(default=False, init=False, repr=False)
    """Whether an output was found to have no other loss."""

    # the batch

    def divide(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the other entries of a dict, and its labels: one tensor where they are called `labels` alone."""
        from trainc.runtime.data.batch import WrongBatch

        names = self.labels or tuple(name for name in batch if _is_label(name))
        if not names or any(name not in batch for name in names):
            shown = ", ".join(f"`{name}`" for name in batch)
            missing = ", ".join(f"`{name}`" for name in names if name not in batch)
            what = f"has no {missing}" if names else "has no entry named as labels are"
            raise WrongBatch(
                f"the batch {what}; its entries are {shown}: write in the `loss model` clause which of them the model's"
                ' loss is of, such as `labels = "NAME"`, or several, `labels = ["ONE", "OTHER"]`'
            )
        inputs = {name: value for name, value in batch.items() if name not in names}
        targets = {name: batch[name] for name in names}
        return inputs, targets[LABELS] if names == (LABELS,) else targets

    def choose(self, targets: Any) -> Any:
        """Return the targets that the model is given by name."""
        if self.labels is None or not isinstance(targets, Mapping):
            return targets
        if lacking := [name for name in self.labels if name not in targets]:
            known = ", ".join(f"`{name}`" for name in targets)
            raise LossMismatch(f"the targets have no `{lacking[0]}`; they are {known}")
        return {name: targets[name] for name in self.labels}

    def keywords(
        self, model: Any, inputs: Any, targets: Any, views: int, mean_loss: bool
    ) -> dict[str, Tensor]:
        named = self._named(targets)
        self._check_keywords(model, inputs, named)
        return {name: self._of_views(one, views, mean_loss) for name, one in named.items()}

    def _named(self, targets: Any) -> dict[str, Tensor]:
        """Return the targets by the names that the model has for them."""
        import torch

        if isinstance(targets, Mapping):
            return dict(targets)
        several: Sequence[Tensor] = (targets,) if isinstance(targets, torch.Tensor) else targets
        names = self.labels or (LABELS,)
        if len(names) != len(several):
            raise LossMismatch(
                f"the data gives {len(several)} tensors of targets, and the model is given {len(names)} by name: write"
                ' all names in the `loss model` clause, such as `labels = ["start_positions", "end_positions"]`'
            )
        return dict(zip(names, several, strict=True))

    def _check_keywords(self, model: Any, inputs: Any, named: Mapping[str, Tensor]) -> None:
        """Raise LossMismatch where the inputs hold a target already, or the model takes none of its name."""
        if isinstance(inputs, Mapping) and (twice := [name for name in named if name in inputs]):
            raise LossMismatch(
                f"the inputs hold `{twice[0]}`, and the batch has targets besides, which `loss model` would pass to the"
                f" model by this name: take `{twice[0]}` out of the inputs; or give the dict alone, without targets"
            )
        import torch

        if torch.compiler.is_compiling() or tuple(named) in self._seen:
            return
        forward = getattr(getattr(model, "module", model), "forward", model)
        known = inspect.signature(forward).parameters.values()
        names = [one.name for one in known if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        refused = [name for name in named if name not in names]
        if refused and not any(one.kind is one.VAR_KEYWORD for one in known):
            takes = ", ".join(f"`{name}`" for name in names)
            raise LossMismatch(
                f"the model computes no loss of `{refused[0]}`: its `forward` takes {takes}. Write in the `loss model`"
                ' clause by which name it takes the targets, such as `labels = "targets"`; for a model without a loss'
                ' of its own write `loss cross_entropy`, or `loss call("module:function")`'
            )
        self._seen.add(tuple(named))

    def _of_views(self, targets: Tensor, views: int, mean_loss: bool) -> Tensor:
        """Return the targets of all views; those of further views are ignored where the loss is of the first."""
        import torch

        if views == 1 or mean_loss:
            return targets if views == 1 else torch.cat([targets] * views)
        if targets.is_floating_point() or (self.found or self.counting) == "examples":
            raise LossMismatch(
                "a clause passes every example several times and trains the loss of the first pass, and a model's own"
                " loss is of all passes unless targets of the others can be ignored: that needs class indices, of which"
                ' the loss counts those that are not `ignore_index`. Write `loss call("module:function")` in place of'
                " `loss model`, or remove the clause"
            )
        ignored = torch.full_like(targets, self.ignore_index)
        return torch.cat([targets, *[ignored] * (views - 1)])

    def ignores(self, model: Any) -> bool:
        """Say whether the model's library has one loss for all models, which ignores labels of -100."""
        names = self.labels or (LABELS,)
        library = hasattr(model, "loss_function") and self.ignore_index == -100
        return library and all("label" in name for name in names)

    # its output

    def read(self, output: Any, inputs: Any) -> Any:
        """Return the loss of an output; raises WrongPick where it has none, or others that would not be trained."""
        from trainc.runtime.data.batch import WrongPick, describe_parts, is_number

        parts = _parts(output)
        if self.output is not None:
            found = parts.get(self.output)
            if found is None:
                shown = f'"{self.output}"' if isinstance(self.output, str) else self.output
                raise WrongPick(
                    f"`output = {shown}`: the model returned {describe_parts(output)}, which has no such part"
                )
            return found
        numbers = {name: one for name, one in parts.items() if is_number(one)}
        found = parts.get("loss")
        if found is None and len(numbers) == 1:
            (found,) = numbers.values()
        if found is None:
            raise WrongPick(
                f"the model returned {describe_parts(output)}, and no `.loss`. `loss model` trains what the model"
                " computes itself: let `forward` return its loss, as an attribute or entry `loss` or as the only number"
                " of a tuple, when it is given its labels; or write which part it is, such as"
                ' `output = "mlm_loss"`; or write `loss cross_entropy` to compute it of the logits'
            )
        self._refuse_others(found, {name: one for name, one in numbers.items() if one is not found})
        return found

    def _refuse_others(self, loss: Any, others: Mapping[str | int, Tensor]) -> None:
        """Raise WrongPick for a number beside the loss that has a gradient and is no part of it; found once."""
        import torch

        from trainc.runtime.data.batch import WrongPick
        from trainc.runtime.soundness.loss_graph import operations_of

        if self._whole or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        reached = set(operations_of(loss)) if isinstance(loss, torch.Tensor) else set()
        for name, other in others.items():
            if other.requires_grad and other.grad_fn not in reached:
                shown = f'"{name}"' if isinstance(name, str) else name
                raise WrongPick(
                    f"the model returned `{name}` beside its loss, which does not hold it: it would not be trained."
                    f' Write a clause for each, `loss model as main {{ output = "loss" }}` and `loss model as other'
                    f" {{ output = {shown} }}`; or the first alone, to leave it out on purpose"
                )
        self._whole = True

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        found = check_user_loss(outputs, "the loss that the model returned")
        if found.dim():
            raise LossMismatch(
                f"the loss that the model returned has shape {list(found.shape)}, and must be one number, the mean over"
                " the micro-batch. Let the model reduce it by a mean"
            )
        return found

    def of_views(self, outputs: Any, targets: Any, views: int, mean_loss: bool) -> Tensor:
        """Return the loss: the targets said already which views it is of."""
        return self(outputs, targets)


def _is_label(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions", "target", "targets")


def _parts(output: Any) -> dict[str | int, Any]:
    """Return the parts of an output by name or index; what is no tensor is left out."""
    import torch

    if isinstance(output, torch.Tensor):
        return {0: output}
    if isinstance(output, Mapping):
        named: Mapping[str | int, Any] = output
    elif isinstance(output, tuple | list):
        named = dict(enumerate(output))
        if hasattr(output, "_fields"):
            named = {**named, **dict(zip(output._fields, output, strict=True))}
    else:
        named = dict(getattr(output, "__dict__", {}))
    return {name: one for name, one in named.items() if isinstance(one, torch.Tensor)}


class OwnLossOfModel(UserLossConstruct):
    """Trains on the loss that the model computes itself, as `model(**batch).loss` of a Hugging Face model.

    A batch is a dict with the labels in it, which reaches the model whole, as `program.step(batch)`; or a pair
    (inputs, targets), whose targets the model is given as the keyword `labels`, or a dict of targets by their names.
    Data of a `data` clause are such pairs. Inputs that hold labels beside targets are refused. `labels` says what the
    labels are called, where it is not so, and which entries of a dict they are. A model whose loss needs no labels is
    given one of its inputs by `labels`, to count the examples.

    The loss is the output's `loss`, or the only number among several values. A number beside it that has a gradient and
    is no part of it, such as the loss of a second head, is refused: a clause for each trains their sum. What a model
    adds to its loss for balance, such as that of a router, is part of it; it is of each micro-batch.

    The shift of labels is the model's business. Where a step has several micro-batches or measures examples, each
    weighs by its counted targets: `counted` says which they are. Without it the first such batch is tried in a few
    passes of two or three examples, some of whose labels are ignored: the gradients tell what the mean runs over, and
    they confirm a `counted` that is written. A loss that is no mean over examples or targets is refused there.
    Floating-point targets all count.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = "loss model"

    labels: Name | tuple[Name, ...] | None = Field(
        default=None,
        description="names by which the model takes the targets, and entries of a dict batch that they are. Default:"
        " `labels`; of a dict every entry with `label` in its name",
    )

    def make_loss(self) -> Loss:
        labels = (self.labels,) if isinstance(self.labels, str) else self.labels
        return ModelLoss(labels, self.counted, self.ignore_index, self.may_ignore, self.logits)

    def reference(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss by definition: the model's."""
        found: Tensor = outputs.loss
        return found
