"""The losses of a run: their weighted sum, and how each adds up over examples and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainc.compiler.method.loss import Loss, LossMismatch, with_prepared, without_prepared
from trainc.compiler.method.user_loss import UserLoss
from trainc.compiler.model.adapted_model import explaining_failures
from trainc.runtime.data.batch import (
    Batch,
    Evaluated,
    Pick,
    WrongPick,
    call_model,
    check_batch,
    describe_parts,
    one_of,
    repeat_views,
)
from trainc.runtime.schedule.clock import Clock

LOSS = "loss:"
"""What stands before the name of a loss in the names of a graph's outputs, and of the number it is multiplied by."""


@dataclass(eq=False)
class LossPart:
    """One loss of the sum: its name, and the number it is multiplied by, where its clause has one."""

    label: str
    loss: Loss
    weight: Callable[[Clock], float] | None = None

    @property
    def scalar(self) -> str:
        """The name of the number that multiplies the loss in a micro-batch."""
        return LOSS + self.label

    def targets(self, targets: Any) -> Any:
        """Return the part of a batch's targets that the loss is of; raises LossMismatch where there is none.

        It is a tensor, or several for a loss that takes them together; with what the loss has prepared, a pair of both.
        """
        given, prepared = without_prepared(targets)
        found = self._chosen(given)
        return (found, prepared[self.label]) if self.label in prepared else found

    def _chosen(self, targets: Any) -> Any:
        pick = self.loss.target
        if isinstance(self.loss, UserLoss) and pick is None:
            return self.loss.choose(targets)
        if isinstance(targets, Tensor):
            if pick is None:
                return targets
            raise self.mismatch(
                f"`target = {_shown(pick)}` of `loss {self.loss.name}`: the data gives one tensor of targets; remove"
                " `target`"
            )
        named = dict(targets) if isinstance(targets, Mapping) else dict(enumerate(targets))
        if pick is None and len(named) == 1:
            (pick,) = named
        found = None if pick is None else named.get(pick)
        if isinstance(found, Tensor):
            return found
        given = f"the data gives {describe_parts(targets)} as targets"
        if pick is None:
            raise self.mismatch(
                f"{given}, and `loss {self.loss.name}` does not say which it is of: write"
                f" `target = {_shown(next(iter(named)))}`, or another of them, in its clause"
            )
        raise self.mismatch(f"`target = {_shown(pick)}`: {given}, which has no such tensor")

    def mismatch(self, message: str) -> LossMismatch:
        """Return the error of targets that are at fault."""
        error = LossMismatch(message)
        error.label = self.label
        return error


def _shown(pick: Pick) -> str:
    return f'"{pick}"' if isinstance(pick, str) else str(pick)


@dataclass(frozen=True, slots=True)
class OutputParts:
    """What of a model's output each loss is `of`, by its name, and the logits that clauses read: empty without any."""

    of: Mapping[str, Any]
    logits: Tensor


class Losses:
    """The weighted sum of one or several losses, each a mean over its own counted targets.

    A micro-batch has a fraction of each loss: of the targets that the loss counts in the step. Its loss weight is the
    mean of these fractions, and an example's weight the mean of its own: with one loss they are those of the loss.
    """

    def __init__(self, parts: Sequence[LossPart]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def of(cls, loss: Loss) -> Losses:
        """Return a loss alone."""
        return cls([LossPart(loss.name, loss)])

    @property
    def first(self) -> Loss:
        """The first loss: terms of clauses read its output and its targets."""
        return self.parts[0].loss

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """The numbers of losses that change in the run, by the names of a graph's inputs."""
        return tuple(f"{p.scalar}.{name}" for p in self.parts for name in p.loss.numbers)

    @cached_property
    def is_sum(self) -> bool:
        """Whether there are several losses, or one with a weight: each is then reported by its name."""
        return len(self.parts) > 1 or any(part.weight is not None for part in self.parts)

    # the model

    def batch(self, batch: Any) -> Batch:
        """Return a batch as (inputs, targets): a dict is divided where the model computes a loss of what it holds.

        With the first one the losses' companions are copied, before a clause changes weights for passes or evaluations.
        Raises WrongBatch, a TypeError, where it is no batch.
        """
        for companion in (one for part in self.parts for one in part.loss.companions):
            if not companion.made:
                companion.copy()
        if isinstance(batch, Mapping):
            for part in self.parts:
                if isinstance(part.loss, UserLoss) and part.loss.in_model:
                    return check_batch(part.loss.divide(batch))
        return check_batch(batch)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Return a micro-batch whose targets hold what losses read of it besides; raises LossMismatch as these do."""
        prepared: dict[str, Tensor] = {}
        for part in self.parts:
            if part.loss.companions:
                try:
                    prepared[part.label] = part.loss.prepare(batch[0], part.targets(batch[1]))
                except (LossMismatch, WrongPick) as error:
                    error.label = part.label
                    raise
        return (batch[0], with_prepared(batch[1], prepared)) if prepared else batch

    def run(
        self, model: Callable[..., Any], batch: Batch, views: int = 1, mean_loss: bool = False
    ) -> OutputParts:
        """Return what is read of a model's output for a batch, each example `views` times; see `read`."""
        output = self.call(model, batch, views, mean_loss)
        return self.read(output, repeat_views(batch[0], views))

    def call(
        self, model: Callable[..., Any], batch: Batch, views: int = 1, mean_loss: bool = False
    ) -> Any:
        """Return the model's output for the inputs, and for the targets where it computes a loss of them.

        Of every view with `mean_loss`; else such a loss is of the first.
        """
        named = self.keywords(model, batch, views, mean_loss)
        with explaining_failures():
            return call_model(model, repeat_views(batch[0], views), named)

    def keywords(
        self, model: Any, batch: Batch, views: int = 1, mean_loss: bool = True
    ) -> dict[str, Tensor]:
        """Return what a model is given of the targets by name, where it computes a loss of them."""
        named: dict[str, Tensor] = {}
        for part in self.parts:
            if isinstance(part.loss, UserLoss) and part.loss.in_model:
                own = part.targets(batch[1])
                try:
                    named |= part.loss.keywords(model, batch[0], own, views, mean_loss)
                except LossMismatch as error:
                    error.label = part.label
                    raise
        return named

    def read(self, output: Any, inputs: Any) -> OutputParts:
        """Return what is read of a model's output for these inputs; raises WrongOutput where it is not there."""
        found: dict[str, Any] = {}
        label = self.parts[0].label
        try:
            for part in self.parts:
                label = part.label
                found[label] = part.loss.read(output, inputs)
            label = self.parts[0].label
            logits = self.first.logits_of(output, found[label])
        except WrongPick as error:
            error.label = label
            raise
        return OutputParts(found, torch.empty(0) if logits is None else logits)

    def targets_to_read(self, targets: Any) -> Tensor:
        """Return the targets that clauses read: those of the first loss."""
        part = self.parts[0]
        found = part.targets(without_prepared(targets)[0])
        return part.loss.aligned(found) if isinstance(part.loss, UserLoss) else found

    def add(self, values: Mapping[str, Tensor], scalars: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of losses by name; what has no number among the scalars adds nothing."""
        if not self.is_sum:
            return values[self.parts[0].label]
        weighted = [
            values[part.label] * scalars[part.scalar]
            for part in self.parts
            if part.scalar in scalars
        ]
        return sum(weighted[1:], start=weighted[0])

    def numbers_now(self, clock: Clock) -> dict[str, float]:
        """Return the numbers of losses that change in the run, as they are now, by the names of a graph's inputs."""
        schedules = [one for part in self.parts for one in part.loss.numbers.values()]
        return {n: schedule(clock) for n, schedule in zip(self.scalars, schedules, strict=True)}

    def use(self, numbers: Mapping[str, Any]) -> None:
        """Let the losses compute with these numbers, which may be among others."""
        for part in self.parts:
            if part.loss.numbers:
                part.loss.now = {n: numbers[f"{part.scalar}.{n}"] for n in part.loss.numbers}

    def counts_now(self, part: LossPart, scalars: Mapping[str, Tensor]) -> bool:
        """Say whether a loss counts a target in a micro-batch: it has a number, or is alone."""
        return not self.is_sum or part.scalar in scalars

    def weights_now(self, clock: Clock) -> dict[str, float]:
        """Return what each loss of a sum is multiplied by now, by name; nothing for a loss alone."""
        if not self.is_sum:
            return {}
        return {p.label: 1.0 if p.weight is None else p.weight(clock) for p in self.parts}

    def evaluated(self, outputs: Mapping[str, Any], targets: Any, clock: Clock) -> Evaluated:
        """Return the loss of an evaluated batch as a sum and its count, and losses of a sum and metrics as such pairs.

        The loss of a sum is per example: a run takes it from the losses of the whole evaluation, `weights_now`.
        """
        others: dict[str, tuple[float, float]] = {}
        total, own = 0.0, (0.0, 0.0)
        self.use(self.numbers_now(clock))
        for part in self.parts:
            of_part = part.targets(targets)
            count, value = part.loss.count_evaluated(of_part), outputs[part.label]
            mean = float(part.loss(value, of_part)) if count else math.nan
            own = mean * count if count else 0.0, count
            metrics = part.loss.metrics(value, of_part)
            if not self.is_sum:
                return own[0], own[1], dict(metrics)
            others[part.label] = own
            others |= {f"{part.label}_{name}": pair for name, pair in metrics.items()}
            total += self.weights_now(clock)[part.label] * mean if count else 0.0
        examples = len(one_of(targets))
        return total * examples, examples, others

    def joined(self, parts: Sequence[Evaluated], clock: Clock) -> Evaluated:
        """Return what `evaluated` gives for a batch from what it gave for the parts of it."""
        others: dict[str, tuple[float, float]] = {}
        for _, _, found in parts:
            for name, (value, count) in found.items():
                before = others.get(name, (0.0, 0.0))
                others[name] = before[0] + value, before[1] + count
        total, counted = sum(one[0] for one in parts), sum(one[1] for one in parts)
        if self.is_sum:
            means = {n: value / count for n, (value, count) in others.items() if count}
            weights = self.weights_now(clock)
            total = counted * sum(weights[n] * means[n] for n in weights if n in means)
        return total, counted, others

    def check_values(self, targets: Any) -> None:
        """Raise LossMismatch for floating-point targets that the loss of them does not have; reads the device."""
        for part in self.parts:
            if (why := part.loss.misfit(part.targets(targets))) is not None:
                raise part.mismatch(why)

    @contextmanager
    def naming_classes(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Raise LossMismatch where this block fails, and a target of the batches is no class of the output."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            for _, targets in batches:
                for part in self.parts:
                    if (why := part.loss.out_of_range(part.targets(targets))) is not None:
                        raise part.mismatch(why) from error
            raise

    # what counts

    def counts(self, targets: Any) -> dict[str, float]:
        """Return what the mean of each loss is divided by, by name."""
        return {part.label: part.loss.count(part.targets(targets)) for part in self.parts}

    def fractions(self, counts: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Return the fractions of each micro-batch from their counts: NaN for a loss that counts none in the step."""
        totals = {part.label: sum(count[part.label] for count in counts) for part in self.parts}
        return [
            {name: count[name] / total if total else math.nan for name, total in totals.items()}
            for count in counts
        ]

    def example_weights(self, targets: Any, fractions: Mapping[str, float]) -> Tensor:
        """Return each example's weight, (examples,), float64: in its micro-batch, or with `fractions` in the step.

        The fractions are those of its micro-batch, which a sum needs where it is not the whole step.
        """
        if not self.is_sum:
            (part,) = self.parts
            return part.loss.weights(part.targets(targets))
        own = self.example_fractions(targets)
        fractions = fractions or dict.fromkeys(own, 1.0)
        of_step = [
            own[name] * fraction
            for name, fraction in fractions.items()
            if name in own and not math.isnan(fraction)
        ]
        if not of_step:
            first = self.parts[0]
            return first.loss.weights(first.targets(targets))  # NaN: a mean over nothing
        losses = sum(not math.isnan(fraction) for fraction in fractions.values())
        return sum(of_step[1:], start=of_step[0]) / losses

    def example_fractions(self, targets: Any) -> dict[str, Tensor]:
        """Return each example's fraction of each loss that counts a target, (examples,), by name."""
        counts = self.counts(targets)
        return {
            part.label: part.loss.weights(part.targets(targets))
            for part in self.parts
            if counts[part.label]
        }


def mean_fraction(fractions: Mapping[str, float]) -> float:
    """Return the loss weight of a micro-batch with these fractions; NaN where no loss counts a target in the step."""
    known = [fraction for fraction in fractions.values() if not math.isnan(fraction)]
    return sum(known) / len(known) if known else math.nan
