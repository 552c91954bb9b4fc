"""Factors on slices of a weight: queries, keys and values of one parameter, or heads, have a rate each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from trainc.runtime.processes.sharded import is_sharded, local, shard_like
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.optimizer import LrFactor
from trainc.runtime.step.record import Step
from trainc.runtime.step.updates import Update, UpdateTransform

Cut = Callable[[Tensor], Sequence[Tensor]]
"""Returns views of a slice of a weight."""


@dataclass(frozen=True, slots=True)
class Slices:
    """A weight of a shape as the slices that it consists of, each with a factor on the learning rate."""

    shape: tuple[int, ...]
    factors: tuple[tuple[Cut, LrFactor], ...]

    @property
    def mean(self) -> float:
        """Return the mean factor, which the rate of the whole parameter has."""
        return fmean(factor.factor for _, factor in self.factors)

    @property
    def differ(self) -> bool:
        return len({factor.factor for _, factor in self.factors}) > 1

    def scale(self, update: Update) -> None:
        """Multiply each slice of an update, which has the mean factor, by its own factor over that."""
        if update.index is None and not is_sharded(update.change):
            self._scale(update.change)
            return
        whole = local(update.change).new_ones(self.shape)
        self._scale(whole)
        if update.index is not None:
            update.change.mul_(whole.flatten()[update.index])
        else:
            update.change.mul_(shard_like(whole, update.change))

    def _scale(self, whole: Tensor) -> None:
        mean = self.mean
        for cut, factor in self.factors:
            for view in cut(whole):
                view.mul_(factor.factor / mean)


@dataclass(frozen=True, slots=True)
class WhileTheyDiffer(Gate):
    """Open in the steps in which slices of a weight have different factors."""

    slices: tuple[Slices, ...] = ()

    def fires(self, clock: Clock) -> bool:
        return any(one.differ for one in self.slices)


class ScaleSlices(UpdateTransform):
    """Phase 10: multiply slices of updates, after all that changes whole updates."""

    of_rate = True

    def __init__(self, name: str, slices: Mapping[str, Slices]) -> None:
        self.name, self.slices = name, slices
        self.gate = WhileTheyDiffer(slices=tuple(slices.values()))

    def change(self, updates: Sequence[Update], step: Step) -> None:
        for update in updates:
            if self.slices[update.name].differ:
                self.slices[update.name].scale(update)
