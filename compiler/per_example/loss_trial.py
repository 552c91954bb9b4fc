"""A few small passes of a loss that the user's own code computes: what examples weigh in the loss of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.method.loss import LossFailed, LossMismatch
from trainc.compiler.method.losses import Losses, LossPart
from trainc.compiler.method.user_loss import Counting, UserLoss
from trainc.compiler.per_example.batch_slices import possible_slicers
from trainc.runtime.data.batch import Batch, WrongOutput, map_tensors, one_of
from trainc.runtime.processes.sharded import is_sharded, reshard

RULES: tuple[Counting, ...] = ("targets", "shifted_targets", "examples")
MEAN_TOLERANCE = 0.02
"""The part of a gradient that may be no mean of single ones; rounding in 16 bits and small balance terms cause it."""
_EXAMPLES = 8
"""How many examples are compared at most."""
_ENTRIES = 1 << 16
"""How many entries of gradients are compared, unless the smallest parameter has more."""


@dataclass
class Weighed:
    """What the first of two sets of examples weighs in the loss of both, and how much of that is no such mean."""

    weight: float
    rest: float


class LossTrial:
    """Small passes of two or three examples of a batch."""

    def __init__(self, model: nn.Module, part: LossPart, loss: UserLoss, batch: Batch) -> None:
        self.model, self.part, self.loss, self.batch = model, part, loss, batch
        self.sharded = any(map(is_sharded, model.parameters()))
        self.compared = [] if self.sharded else _compared(model)
        targets = part.targets(batch[1])
        tensors = [targets] if isinstance(targets, Tensor) else list(_values(targets))
        self.indices = (
            tensors[0] if len(tensors) == 1 and not tensors[0].is_floating_point() else None
        )
        self.count = len(tensors[0])
        self.failure: Exception | None = None
        self.rounding = 0.0
        """Gradients that are smaller may be rounding of the loss."""

    def may_ignore(self) -> bool:
        """Say whether some class indices may be ignored to see what the loss does.

        On a GPU a class that is none ends the process, so there the batch or the spec has to know ignored ones.
        """
        if self.indices is None:
            return False
        if self.loss.may_ignore or self.indices.is_cpu or self.loss.ignores(self.model):
            return True
        return not self.sharded and bool((self.indices == self.loss.ignore_index).any())

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Let passes in this block have gradients, unless weights are sharded: then the losses are compared."""
        with torch.set_grad_enabled(not self.sharded):
            yield
        if self.sharded:
            reshard(self.model)

    # passes

    def of_ignored(self) -> tuple[Weighed, dict[Counting, float]] | None:
        """Return what an example with few targets weighs beside one with more, and what it would by each rule.

        Returns None also where the loss refuses a target that is no class: `failure` says how. Then it ignores none.
        """
        assert self.indices is not None
        try:
            return (
                self._of_ignored_example() if self.indices.dim() < 2 else self._of_ignored_targets()
            )
        except LossFailed as error:
            self.failure = error.__cause__ if isinstance(error.__cause__, Exception) else error
            return None

    def _of_ignored_targets(self) -> tuple[Weighed, dict[Counting, float]] | None:
        assert self.indices is not None
        first, second = self._rows()
        targets = self.indices[[first, second]]
        counted = (targets != self.loss.ignore_index).reshape(2, -1)
        kept = torch.zeros_like(counted)
        for row, number in ((0, 1), (1, 3)):
            # Those that count first, since a padded place may count in no case.
            later = counted[row].int().argsort(descending=True, stable=True).tolist()
            later.remove(0)
            whole = counted.shape[1] > 2 or row == 1
            kept[row, [*([0] * whole), *later[:number]]] = True
        targets = self._filled(targets).where(kept.view_as(targets), self.loss.ignore_index)
        weights = {rule: self._weight(rule, targets) for rule in RULES}
        tells = len({round(w, 3) for w in weights.values()}) > 1
        if not (tells or self.sharded):
            return None
        weighed = self._weigh([first], targets[:1], [second], targets[1:], [first, second], targets)
        return (weighed, weights) if tells and weighed is not None else None

    def _of_ignored_example(self) -> tuple[Weighed, dict[Counting, float]] | None:
        """Return what the first of two examples weighs beside a third whose only target is ignored."""
        assert self.indices is not None
        first, second = self._rows()
        targets = self.indices[[first, second, first]].clone()
        tells = not bool((targets == self.loss.ignore_index).any())
        if not (tells or self.sharded):
            return None
        targets[2] = self.loss.ignore_index
        rows = [first, second, first]
        weighed = self._weigh([first], targets[:1], [second], targets[1:2], rows, targets)
        weights: dict[Counting, float] = {"targets": 1 / 2, "examples": 2 / 3}
        return (weighed, weights) if tells and weighed is not None else None

    def of_whole(self) -> Weighed | None:
        """Return what one example weighs beside another, both with all of their targets."""
        first, second = self._rows()
        rows = torch.tensor([first, second], device=one_of(self.batch[1]).device)
        whole = map_tensors(lambda tensor: tensor[rows], self.part.targets(self.batch[1]))
        if self.indices is not None:
            whole = map_tensors(self._filled, whole)
        one, other = (map_tensors(itemgetter(slice(i, i + 1)), whole) for i in (0, 1))
        return self._weigh([first], one, [second], other, [first, second], whole)

    def other_ignored(self) -> int | None:
        """Return a negative class index that is not known to be ignored; None where there is none."""
        if self.indices is None:
            return None
        wrong = self.indices[(self.indices < 0) & (self.indices != self.loss.ignore_index)]
        return int(wrong[0]) if len(wrong) else None

    def examples_weigh_alike(self) -> bool:
        """Say whether a few examples with all of their class indices weigh the same in the loss of all."""
        if self.sharded or self.indices is None or self.indices.dim() < 2:
            return True
        some = list(range(min(self.count, _EXAMPLES)))
        targets = map_tensors(
            lambda one: self._filled(one[: len(some)]), self.part.targets(self.batch[1])
        )
        alone = [
            self._gradient([i], map_tensors(itemgetter(slice(i, i + 1)), targets)) for i in some
        ]
        gap = self._gradient(some, targets) - torch.stack(alone).mean(0)
        largest = max(float(one.norm()) for one in alone)
        rounds = any(p.dtype.itemsize == 2 for p in self.compared)
        return float(gap.norm()) <= (MEAN_TOLERANCE if rounds else 1e-3) * largest

    def _filled(self, targets: Tensor) -> Tensor:
        """Return class indices with another one of them in place of what is ignored."""
        ignored = targets == self.loss.ignore_index
        valid = targets[~ignored]
        fill = valid[0] if len(valid) else targets.new_zeros(())
        return torch.where(ignored, fill, targets)

    def _rows(self) -> tuple[int, int]:
        """Return two examples; those with most targets that are not ignored."""
        if self.indices is None:
            return 0, min(1, self.count - 1)
        kept = (self.indices != self.loss.ignore_index).reshape(self.count, -1).sum(1)
        most = kept.sort(descending=True, stable=True).indices.tolist()
        return most[0], most[min(1, self.count - 1)]

    def _weight(self, rule: Counting, targets: Tensor) -> float:
        before, self.loss.found = self.loss.found, rule
        try:
            return float(self.loss.weights(targets)[0])
        finally:
            self.loss.found = before

    def _weigh(
        self,
        first: Sequence[int],
        of_first: Any,
        second: Sequence[int],
        of_second: Any,
        both: Sequence[int],
        of_both: Any,
    ) -> Weighed | None:
        """Return what the first weighs in the loss of both; None where a pass fails, or the two are alike."""
        try:
            one, two, whole = (
                self._gradient(rows, targets)
                for rows, targets in ((first, of_first), (second, of_second), (both, of_both))
            )
        except (LossMismatch, WrongOutput):
            raise
        # The user's code may raise anything for targets that it does not know, or for few examples.
        except Exception as error:
            self.failure = error
            return None
        apart = one - two
        size, largest = float(apart.norm()), max(float(one.norm()), float(two.norm()))
        finite = bool(torch.isfinite(torch.stack([one, two, whole])).all())
        if not finite or max(largest, float(whole.norm())) <= self.rounding:
            return None
        if size <= 1e-4 * largest:  # alike, they tell no weight
            off = float((whole - one).norm()) / max(largest, float(whole.norm()), 1e-30)
            return Weighed(0.5, off) if off > MEAN_TOLERANCE else None
        weight = float((whole - two) @ apart) / size**2
        rest = whole - weight * one - (1 - weight) * two
        return Weighed(weight, float(rest.norm()) / largest)

    def _gradient(self, rows: Sequence[int], targets: Any) -> Tensor:
        """Return the gradient of the loss of these examples, flat, float64; the loss itself where none can be taken."""
        loss = self._loss(rows, targets)
        self.rounding = max(self.rounding, 10 * torch.finfo(loss.dtype).eps * abs(loss.item()))
        if not self.compared:
            return loss.detach().double().reshape(1)
        found = torch.autograd.grad(loss, self.compared, allow_unused=True)
        flat = [
            torch.zeros_like(p) if gradient is None else gradient
            for p, gradient in zip(self.compared, found, strict=True)
        ]
        return torch.cat([one.detach().double().flatten() for one in flat])

    def _loss(self, rows: Sequence[int], targets: Any) -> Tensor:
        for slicer in possible_slicers(self.batch[0], [self.count]):
            try:
                return self._pass(slicer.take(self.batch[0], rows), rows, targets)
            except (LossMismatch, WrongOutput):
                raise
            except Exception as error:  # a mask may have been sliced as if it held examples
                failure = error
        raise failure

    def _pass(self, inputs: Any, rows: Sequence[int], targets: Any) -> Tensor:
        """Return the loss of a few examples; other losses of a sum do not take part."""
        alone = Losses([self.part])
        places = torch.tensor(rows, device=one_of(self.batch[1]).device)
        every = map_tensors(lambda tensor: tensor[places], self.batch[1])
        given = _put(every, self.part, targets)
        read = alone.run(self.model, (inputs, given))
        found: Tensor = self.part.loss(read.of[self.part.label], self.part.targets(given))
        return found


def _values(targets: Any) -> Any:
    return targets.values() if hasattr(targets, "values") else targets


def _put(every: Any, part: LossPart, own: Any) -> Any:
    """Return the targets of a batch with those of one loss in place of its own."""
    if part.loss.target is not None and not isinstance(every, Tensor):
        if isinstance(every, dict):
            return {**every, part.loss.target: own}
        return tuple(own if i == part.loss.target else one for i, one in enumerate(every))
    if isinstance(every, dict) and isinstance(own, dict):
        return {**every, **own}
    if isinstance(every, dict) and len(every) == 1:
        return dict.fromkeys(every, own)
    return own


def _compared(model: nn.Module) -> list[nn.Parameter]:
    """Return the smallest trained parameters, whose gradients are compared."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found: list[nn.Parameter] = []
    size = 0
    for parameter in sorted(trained, key=Tensor.numel):
        if found and size + parameter.numel() > _ENTRIES:
            break
        found.append(parameter)
        size += parameter.numel()
    return found
