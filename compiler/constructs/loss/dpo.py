"""Direct preference optimisation: of two answers the preferred one gains probability over a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.loss._base import LossConstruct
from trainc.compiler.method.loss import Loss, LossMismatch
from trainc.dsl.reading.construct import Effect

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering

Reduction = Literal["mean", "sum", "none"]


class DpoLoss(Loss):
    """Mean over pairs of -log sigmoid(beta * (r - r_ref)), r the log ratio of the probabilities of both answers.

    Logits (B, 2, T, classes), or (2 * B, T, classes) with those of a pair side by side. Targets (B, 2, T) int64, the
    preferred answer first. A pair counts where both answers have a target that counts.
    """

    name = "dpo"

    def __init__(self, beta: float, smoothing: float, ignore_index: int) -> None:
        self.beta, self.smoothing, self.ignore_index = beta, smoothing, ignore_index
        self._classes: int | None = None

    def prepare(self, inputs: Any, targets: Tensor) -> Tensor:
        """Return the log ratios of the reference, (B,)."""
        (reference,) = self.companions
        logits = reference.logits(inputs, self.output)
        self._classes = logits.shape[-1]
        return self._log_ratios(logits, targets)

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        own, rewards = self._rewards(outputs, targets)
        counted = self.target_weights(own) > 0
        each = _pair_losses(rewards, self.smoothing).where(counted, 0.0)
        mean: Tensor = each.sum() / counted.sum()
        return mean

    def target_weights(self, targets: Any) -> Tensor:
        """Return 1 for each pair whose answers both have a target that counts, float64 (B,)."""
        own = targets[0] if isinstance(targets, tuple) else targets
        if (why := self.misfit(own)) is not None:
            raise LossMismatch(why)
        found: Tensor = (own != self.ignore_index).any(-1).all(-1).double()
        return found

    def misfit(self, targets: Any) -> str | None:
        """Return what to write for targets that are not those of pairs of answers."""
        import torch

        own = targets[0] if isinstance(targets, tuple) else targets
        if own.dim() == 3 and own.shape[1] == 2 and own.dtype == torch.int64:
            return None
        return (
            f"the targets are {str(own.dtype).removeprefix('torch.')}{list(own.shape)}, and `loss dpo` needs those of"
            " pairs of answers, int64[B, 2, T]: give the preferred answer first, and pad both to one length by"
            f" `ignore_index`, which is {self.ignore_index}"
        )

    def metrics(self, outputs: Tensor, targets: Any) -> Mapping[str, tuple[float, float]]:
        """Return in how many pairs the preferred answer gained more over the reference, as `accuracy`."""
        own, rewards = self._rewards(outputs, targets)
        counted = self.target_weights(own) > 0
        return {"accuracy": (float(((rewards > 0) & counted).sum()), float(counted.sum()))}

    def out_of_range(self, targets: Any) -> str | None:
        """Return what to write where a target is none of the reference's classes."""
        own = targets[0] if isinstance(targets, tuple) else targets
        counted = own[own != self.ignore_index]
        if self._classes is None:
            return None
        wrong = counted[(counted < 0) | (counted >= self._classes)]
        if not len(wrong):
            return None
        return (
            f"a target is the class {int(wrong[0])}, and the model's output has {self._classes} classes, from 0 to"
            f" {self._classes - 1}: give the model an output for every class, or mark targets that are to be left out"
            f" by `ignore_index`, which is {self.ignore_index}"
        )

    def classes_last(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the logits with the two answers of an example on an axis of their own."""
        return logits.unflatten(0, (-1, 2)) if logits.dim() == 3 else logits

    def _rewards(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the targets, and how much more the preferred answer gained over the reference, times beta, (B,)."""
        if not isinstance(targets, tuple):
            raise ValueError(
                "`loss dpo` compares with its reference, of which these targets have nothing: let the program compute"
                " it, by `program.step(batch)`, `program.loss(batch)` or `program.evaluate(*batch)`"
            )
        own, reference = targets
        return own, self.beta * (self._log_ratios(outputs, own) - reference)

    def _log_ratios(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return log p(preferred) - log p(other), summed over the targets that count, (B,), in float32 at least."""
        import torch
        from torch.nn.functional import cross_entropy

        self.target_weights(targets)
        found = self.classes_last(logits, targets)
        if found.dim() != 4 or found.shape[:3] != targets.shape:
            raise LossMismatch(
                f"the model's output has shape {list(logits.shape)} and the targets {list(targets.shape)}; `loss dpo`"
                " needs logits of both answers of each example, (B, 2, T, classes) or (2 * B, T, classes), and targets"
                " (B, 2, T). Let `forward` fold the axis of the answers: `self.model(ids.flatten(0, 1))`"
            )
        wide = found.to(torch.promote_types(found.dtype, torch.float32)).flatten(0, 2)
        each = cross_entropy(
            wide, targets.flatten(), ignore_index=self.ignore_index, reduction="none"
        )
        preferred, other = each.view(targets.shape).sum(-1).unbind(1)
        return other - preferred


class Dpo(LossConstruct):
    """Trains a language model on pairs of answers, one preferred, without a model of rewards.

    The loss of a pair is `-log sigmoid(beta * (r - r_ref))`: r is the log probability of the preferred answer minus
    that of the other, each summed over the answer's targets, and r_ref is the same of the reference. The reference is
    the model as it is before the first step or evaluation, after a resume the same one. It runs in evaluation mode, has
    no gradient, and reads the inputs of the same batch, in evaluations too. A saved program holds weights alone, which
    are its new reference; `state_dict` and the checkpoints of a run hold the reference. With `label_smoothing` the loss
    is the mean over both orders of a pair, of which the given one is wrong with this probability. `accuracy` is the
    share of pairs whose preferred answer has gained more over the reference.

    An example holds both answers, the preferred one first: inputs (B, 2, T) and targets int64 (B, 2, T), each at the
    place of the output that it is the target of, as of `loss cross_entropy`. Those of prompt and padding are
    `ignore_index`. A pair counts where both of its answers have a target that counts, and the loss is the mean over
    these pairs. The model returns logits (B, 2, T, classes), or (2 * B, T, classes) with those of a pair side by side.
    For a model that takes texts one by one let `forward` fold the axis: `self.model(ids.flatten(0, 1))`.
    """

    cite: ClassVar = (
        "Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model, NeurIPS 2023,"
        " arXiv:2305.18290, eq. 7; label_smoothing: Mitchell, A note on DPO with noisy preferences and relationship to"
        " IPO, 2023, eq. 3"
    )
    usage: ClassVar = "loss dpo { beta = 0.1 }"
    evaluated: ClassVar = ("accuracy",)
    functions: ClassVar = ("trainc.compiler.constructs.loss.dpo:dpo_loss",)
    effects: ClassVar = (
        Effect("perturb", "copy the model as the reference", ("params",)),
        Effect("forward", "compute the loss", ("forward", "inputs"), ("loss",)),
    )

    beta: float = Field(
        default=0.1,
        gt=0,
        description="what the difference of log ratios is multiplied by: the larger, the nearer the model stays to the"
        " reference",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="probability that the answers of a pair are in the wrong order",
    )
    ignore_index: int = Field(
        default=-100, description="target that is no part of an answer: of prompt and padding"
    )

    def make_loss(self) -> DpoLoss:
        return DpoLoss(self.beta, self.label_smoothing, self.ignore_index)

    def equip(self, loss: Loss, to: Lowering) -> None:
        """Keep the model at its start as the reference."""
        loss.companions = (to.companion("reference"),)

    def reference(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss by definition, of a pair of logits (B, 2, T, classes): the model's and the reference's."""
        import torch

        losses = []
        for model, frozen, pair in zip(*outputs, targets, strict=True):
            gains = [
                sum(
                    (model[a, t].exp() / model[a, t].exp().sum())[y].log()
                    - (frozen[a, t].exp() / frozen[a, t].exp().sum())[y].log()
                    for t, y in enumerate(answer)
                    if y != self.ignore_index
                )
                for a, answer in enumerate(pair.tolist())
            ]
            if all(isinstance(gain, torch.Tensor) for gain in gains):
                h = self.beta * (gains[0] - gains[1])
                right, wrong = 1 / (1 + (-h).exp()), 1 / (1 + h.exp())
                e = self.label_smoothing
                losses.append(-(1 - e) * right.log() - e * wrong.log())
        total: Tensor = torch.stack(losses).mean()
        return total


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return -log sigmoid(`beta` * ((`chosen` - `reference_chosen`) - (`rejected` - `reference_rejected`))).

    The first four are log probabilities of whole answers, of one shape, pair by pair: of the model that trains, and of
    the frozen reference, which has no gradient. With `label_smoothing` e, 0 <= e < 0.5, the loss is 1 - e times this
    and e times the same of the opposite order. `reduction` gives the mean over all pairs, their sum, both 0-d, or
    `none`, one number for each pair. Raises ValueError for other shapes, values and words. Sources: Rafailov et al.,
    arXiv:2305.18290; Mitchell 2023.
    """
    given = {"rejected": rejected, "reference_chosen": reference_chosen}
    for name, one in {**given, "reference_rejected": reference_rejected}.items():
        if one.shape != chosen.shape:
            raise ValueError(
                f"`chosen` has shape {list(chosen.shape)} and `{name}` {list(one.shape)}: give the log probabilities of"
                " a pair at the same place of all four"
            )
    if not beta > 0:
        raise ValueError(f"beta = {beta:g}: expected a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing:g}: expected 0 or more, below 0.5")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` is {reduction!r}: write mean, sum or none")
    reference = (reference_chosen - reference_rejected).detach()
    each = _pair_losses(beta * (chosen - rejected - reference), label_smoothing)
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


def _pair_losses(rewards: Tensor, smoothing: float) -> Tensor:
    """Return the loss of each pair from how much more reward the preferred answer has."""
    from torch.nn.functional import softplus

    if not smoothing:
        return softplus(-rewards)
    return (1 - smoothing) * softplus(-rewards) + smoothing * softplus(rewards)
