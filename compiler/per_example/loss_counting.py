"""Find what a loss counts that the user's own code computes, from the gradients of a few small passes.

Such a loss of two examples together is the mean of their losses alone, weighted by what it counts of each. So are its
gradients: they tell the weights, and whether it is such a mean at all. Where targets are class indices, some of them
are ignored in these passes, since the rules differ only there.
"""

from __future__ import annotations

from torch import nn

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.user_loss import Counting, UserLoss
from trainc.compiler.model.eager import eager_operations
from trainc.compiler.model.undisturbed import in_mode, undisturbed
from trainc.compiler.per_example.loss_trial import MEAN_TOLERANCE, RULES, LossTrial, Weighed
from trainc.runtime.data.batch import Batch
from trainc.runtime.processes.replica_group import ReplicaGroup

_WEIGHT_TOLERANCE = 0.03
"""How far a weight may be from the one of a rule: rules are at least 0.06 apart, and 16 bits round to about 0.01."""
_UNKNOWN, _FAILED = -1, -2
"""What a process says to the others where it has found no rule, or an error."""


class LossNotAMean(SiteError):
    """The loss of several examples is not the weighted mean of their own losses."""

    rule = "loss-not-a-mean"


def settle(
    model: nn.Module,
    sites: Sites,
    losses: Losses,
    batch: Batch,
    peers: ReplicaGroup | None = None,
) -> bool:
    """Find what each loss of the user's own code counts, unless it is known; say whether all is known now.

    All `peers` take what the first of them found that knows it. Raises LossNotAMean where a loss is no mean of those of
    examples, and LossMismatch where it has to say what it counts, or says it wrongly, here or in another process.
    """
    for part in losses.parts:
        if isinstance(part.loss, UserLoss) and part.loss.found is None:
            trial = _Verdict(model, part, part.loss, batch)
            quiet = undisturbed(model), eager_operations(), in_mode(model, training=False)
            error: Exception | None = None
            found: Counting | None = None
            try:
                with sites.inactive(), quiet[0], quiet[1], quiet[2], trial.gradients():
                    found = trial.rule()
            except (LossNotAMean, LossMismatch) as raised:
                error = raised
            part.loss.found = found if peers is None else _agreed(peers, found, error)
            if error is not None:
                raise error
    return all(not isinstance(p.loss, UserLoss) or p.loss.found for p in losses.parts)


def _agreed(
    peers: ReplicaGroup, found: Counting | None, error: Exception | None
) -> Counting | None:
    """Return what the first process found that knows it; raises LossMismatch where another one has an error."""
    own = _FAILED if error is not None else _UNKNOWN if found is None else RULES.index(found)
    everyone = [int(row[0]) for row in peers.gather_rows([float(own)])]
    if _FAILED in everyone and error is None:
        raise LossMismatch(
            f"process {everyone.index(_FAILED)} found that what a loss counts does not fit: its own error says more"
        )
    known = [number for number in everyone if number >= 0]
    return RULES[known[0]] if known else None


class _Verdict(LossTrial):
    """What small passes of a loss say of it."""

    def rule(self) -> Counting | None:
        """Return the rule that fits; None for a single example that tells nothing, which another batch may.

        Raises LossNotAMean or LossMismatch where none fits, or none is known.
        """
        given = self.loss.counting
        if given != "examples" and (other := self.other_ignored()) is not None:
            raise self._ignores(f"the targets hold {other}, which is no class")
        found = self.of_ignored() if self.may_ignore() else None
        refused = found is None and self.failure is not None
        # Where weights are gathered for a pass, all processes have to run it.
        whole = self.of_whole() if self.sharded else None
        if found is not None:
            weighed, weights = found
            if weighed.rest <= MEAN_TOLERANCE:
                fitting = [
                    r for r, w in weights.items() if abs(w - weighed.weight) <= _WEIGHT_TOLERANCE
                ]
                if given in fitting or (given is None and fitting):
                    return given or fitting[0]
                raise self._other(given, weighed.weight, weights, fitting)
        if not self.sharded:
            whole = self.of_whole()
        if whole is None:
            if given is not None:
                return given
            if self.indices is not None and self.indices.dim() < 2:
                return "targets"
            if self.count == 1 and self.indices is None:
                return None
            raise self._unknown() from self.failure
        if whole.rest > MEAN_TOLERANCE or abs(whole.weight - 0.5) > _WEIGHT_TOLERANCE:
            raise self._no_mean(whole)
        if given != "examples" and found is None and not self.examples_weigh_alike():
            raise self._ignores(
                "examples weigh differently in the loss, though all of their targets count"
            )
        if given is not None:
            return given
        untold = refused or not self.may_ignore()
        if self.indices is not None and self.indices.dim() > 1 and untold:
            raise self._unknown() from self.failure
        return "targets"

    # what is wrong

    def _other(
        self,
        given: Counting | None,
        weight: float,
        weights: dict[Counting, float],
        fitting: list[Counting],
    ) -> LossMismatch:
        shown = ", ".join(f"{w:.3g} by `{rule}`" for rule, w in weights.items())
        what = "an example with two targets that are not ignored, the first among them, beside one with four, weighs"
        if given is None:
            text = (
                f"{what} {weight:.3g} in the loss, and it would weigh {shown}: what the loss counts is not known, which"
                " several micro-batches and measured examples need. Let it be a mean over one of these, or run one"
                " micro-batch"
            )
        else:
            instead = f"write `counted = {fitting[0]}`" if fitting else "remove `counted`"
            text = (
                f"`counted = {given}` does not fit the loss: {what} {weight:.3g}, and it would weigh {shown}:"
                f" {instead}"
            )
        return self._labelled(text)

    def _unknown(self) -> LossMismatch:
        why = (
            f" ({type(self.failure).__name__}: {self.failure})" if self.failure is not None else ""
        )
        return self._labelled(
            "a step of several micro-batches, or with measured examples, has to know what the loss counts, and a few"
            f" passes cannot tell it here{why.splitlines()[0] if why else ''}: write `counted = examples`,"
            " `counted = targets` or `counted = shifted_targets` in the `loss` clause"
        )

    def _ignores(self, why: str) -> LossMismatch:
        return self._labelled(
            f"{why}. Where the loss leaves out a value other than {self.loss.ignore_index}, write which in the `loss`"
            " clause, such as `ignore_index = -1`; where it counts every example once, `counted = examples`"
        )

    def _labelled(self, text: str) -> LossMismatch:
        error = LossMismatch(text)
        error.label, error.field = self.part.label, "counted"
        return error

    def _no_mean(self, found: Weighed) -> LossNotAMean:
        return LossNotAMean(
            "the loss of two examples is no mean of the losses of each: in its gradient the first weighs"
            f" {found.weight:.3g}, where both have as many targets, and a part of {found.rest:.2g} is of neither."
            " Several micro-batches and measured examples need a mean over examples or targets: not a sum, and"
            " not a loss that compares examples with each other. Run one micro-batch in a step, or let it be a mean",
            clause=self.part.label,
        )
