"""Losses that the user's own code computes: which of its targets such a loss counts, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainc.compiler.method.loss import Loss, LossMismatch

if TYPE_CHECKING:
    from torch import Tensor

Counting = Literal["examples", "targets", "shifted_targets"]
"""What a mean runs over: examples, targets that are not `ignore_index`, or these without the first of each example."""


class UserLoss(Loss):
    """A mean that the user's own code computes, in the model or in a function.

    Its targets are several tensors, or one. What it counts is `counting`, where that is given, or what a few passes
    find; nothing asks before that is needed.
    """

    of_classes = True
    in_model: ClassVar[bool] = False
    """Whether the model computes it, of targets that it is given as keywords."""
    counting: Counting | None = None
    found: Counting | None = None
    """What a few passes found or confirmed."""
    logits: str | int | None = None
    may_ignore: bool = False
    """Whether the spec says which target is ignored: then one may be put among the targets to see what it does."""

    @property
    def logits_output(self) -> str | int | None:
        return self.logits

    def logits_of(self, output: Any, read: Any) -> Tensor | None:
        from trainc.runtime.data.batch import find_logits

        return find_logits(output, self.logits)

    def choose(self, targets: Any) -> Any:
        """Return those of the targets that it is of, where no field names one."""
        return targets

    def divide(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return inputs and targets of a batch that is one dict."""
        raise NotImplementedError

    def keywords(
        self, model: Any, inputs: Any, targets: Any, views: int, mean_loss: bool
    ) -> dict[str, Tensor]:
        """Return what the model is given of the targets besides the inputs, by name: of all views of each example."""
        return {}

    # what counts

    def ignores(self, model: Any) -> bool:
        """Say whether it is known to ignore targets of `ignore_index`, which others may take for wrong ones."""
        return False

    def target_weights(self, targets: Any) -> Tensor:
        """Return what each target weighs, at the place of the output that it is the target of."""
        import torch

        known = self.found or self.counting
        one = self.aligned(targets)
        if known == "examples":
            return torch.ones(len(one), dtype=torch.float64, device=one.device)
        if known is None and not one.is_floating_point():
            raise LossMismatch(
                f"what `loss {self.name}` counts is not known yet: a step of several micro-batches finds it, such as"
                " `program.step([first, second, ...])`; or write `counted = ...` in its clause"
            )
        return self.counted(one)

    def count_evaluated(self, targets: Any) -> float:
        """Return what the mean of an evaluated batch weighs: how many targets are not ignored where more is unknown."""
        if self.found or self.counting:
            return self.count(targets)
        return float(self.counted(targets).sum())

    def counted(self, targets: Any) -> Tensor:
        """Return which targets are not ignored, bool; floating-point numbers all count."""
        import torch

        from trainc.runtime.data.batch import one_of

        one = one_of(targets)
        if one.is_floating_point():
            return torch.ones_like(one, dtype=torch.bool)
        return one != self.ignore_index

    def aligned(self, targets: Any) -> Tensor:
        """Return the targets that clauses read, each at the place of the output that it is the target of."""
        import torch

        from trainc.runtime.data.batch import one_of

        one = one_of(targets)
        if (self.found or self.counting) != "shifted_targets" or one.dim() < 2:
            return one
        return torch.cat([one[:, 1:], torch.full_like(one[:, :1], self.ignore_index)], 1)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, tuple[float, float]]:
        return {}


def check_user_loss(value: Any, whose: str) -> Tensor:
    """Return a loss that the user's code computed; raises LossMismatch unless it is a number with a gradient."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise LossMismatch(f"{whose} is {type(value).__name__}, and must be a tensor")
    if not value.is_floating_point():
        raise LossMismatch(
            f"{whose} is of {str(value.dtype).removeprefix('torch.')}: a loss is of floating-point numbers"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not value.requires_grad:
        raise LossMismatch(
            f"{whose} has no gradient: it was detached, computed under `torch.no_grad()`, or reads no weight that"
            " trains"
        )
    return value
