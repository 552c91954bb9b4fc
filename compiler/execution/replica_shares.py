"""What each of several replicas has of a step, so that its means run over the targets and examples of all of them.

Replicas average their gradients, whatever number of targets each has. So a replica with n of the N targets of R
replicas multiplies its loss by R n / N: the average is then the mean over all N. One exchange a step, before its first
pass, tells each what the others have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from trainc.compiler.method.losses import Losses, mean_fraction
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.runtime.data.batch import Batch, one_of
from trainc.runtime.processes.replica_group import ReplicaGroup

_TOLERANCE = 1e-2
"""How far the targets of two micro-batches may be from the fractions that were given for them, relative to the step."""


@dataclass(frozen=True)
class Part:
    """What one process has of a step: examples, passes, and counted targets by loss; NaN for what is not known.

    Targets are counted where that is asked: a device would be waited for.
    """

    examples: float
    count: Callable[[], Mapping[str, float]]
    passes: int = 1

    @classmethod
    def of_micro_batch(
        cls,
        examples: int,
        count: Callable[[], Mapping[str, float]],
        loss_weight: float,
        example_fraction: float,
    ) -> Part:
        """Return that of a process of which one micro-batch, with its fractions of the step, is known."""

        def of_step() -> dict[str, float]:
            return {name: _divided(number, loss_weight) for name, number in count().items()}

        return cls(_divided(examples, example_fraction), of_step)

    @classmethod
    def of_step(cls, micro_batches: Sequence[Batch], losses: Losses) -> Part:
        """Return that of a process of which all micro-batches are known."""

        def of_step() -> dict[str, float]:
            counts = [losses.counts(targets) for _, targets in micro_batches]
            return {part.label: sum(one[part.label] for one in counts) for part in losses.parts}

        examples = sum(len(one_of(targets)) for _, targets in micro_batches)
        return cls(examples, of_step, len(micro_batches))

    @cached_property
    def counts(self) -> Mapping[str, float]:
        """The targets that count in each loss."""
        return self.count()


@dataclass(frozen=True, slots=True)
class ReplicaShares:
    """The parts of all replicas in a step, as this one uses them.

    `losses` are what it multiplies its fractions of each loss by, NaN for a loss that counts no target anywhere;
    `examples` is the same of examples. `before` is the number of examples of the replicas with lower ranks, `samples`
    that of all, `passes` the largest number of passes of a replica, and `own` this one's part.
    """

    losses: Mapping[str, float]
    examples: float
    before: int
    samples: float
    passes: int
    own: Part

    @classmethod
    def exchanged(cls, own: Part, replicas: ReplicaGroup) -> ReplicaShares:
        """Return the shares of a step; all replicas must call this alike, before the first pass of the step.

        Raises ValueError on all of them where one does not know what it has.
        """
        rows = replicas.gather_rows([*own.counts.values(), own.examples, float(own.passes)])
        *counts, examples, passes = rows.unbind(1)
        for rank, row in enumerate(rows[:, : len(counts)].tolist()):
            if any(map(math.isnan, row)):
                raise ValueError(_unknown(rank))
        size, losses = replicas.size, {}
        for name, column in zip(own.counts, counts, strict=True):
            total = float(column.sum())
            losses[name] = size * own.counts[name] / total if total else math.nan
        known = [0.0 if math.isnan(number) else number for number in examples.tolist()]
        total = sum(known)
        return cls(
            losses,
            size * known[replicas.rank] / total if total else 1.0,
            round(sum(known[: replicas.rank])),
            total,
            int(passes.max()),
            own,
        )

    def apply(self, where: MicroBatchSlice, *, sharded: bool) -> MicroBatchSlice:
        """Return the place of a micro-batch in the step of all replicas, from that in its own process."""
        first = where.first_example + self.before
        examples = where.example_fraction * self.examples
        if where.fractions:
            own = {name: _part(where.fractions[name], share) for name, share in self.losses.items()}
            weight = mean_fraction(own)
            if math.isnan(weight):
                own, weight = dict(where.fractions), where.loss_weight
        else:
            own, weight = {}, _part(where.loss_weight, next(iter(self.losses.values())))
            weight = where.loss_weight if math.isnan(weight) else weight
        differs = weight != where.loss_weight or not weight
        alone = where.loss_weight if sharded and differs else None
        return MicroBatchSlice(
            weight, examples, first, where.sample_ids, own, where.stream, own_weight=alone
        )

    def is_of(self, own: Part) -> bool:
        """Say whether these shares are those of a step of which this process has a part of the same size."""
        known = self.own.examples, self.own.passes, dict(self.own.counts)
        return known == (own.examples, own.passes, dict(own.counts))

    def check(self, counts: Mapping[str, float], loss_weight: float) -> None:
        """Raise ValueError where a later micro-batch does not have the targets that its loss weight says."""
        for name, count in counts.items():
            own = self.own.counts[name]
            if abs(count - loss_weight * own) > _TOLERANCE * own:
                raise ValueError(
                    f"a micro-batch has `loss_weight` {loss_weight:.4g} and {count:g} counted targets, but those before"
                    f" it say that this process has {own:g} in the step. Over several processes the loss is the mean"
                    " over the targets of all, so `loss_weight` must be the fraction of counted targets: in a"
                    " `program.micro_batch`, where only your code counts them, give also their number for each example,"
                    " as `weights`; or call `program.step([first, second, ...])`"
                )


def _divided(count: float, fraction: float) -> float:
    return count / fraction if fraction else math.nan


def _part(fraction: float, share: float) -> float:
    """Return a fraction of all replicas; 0 of a replica that has nothing, whose own fraction is not known."""
    return 0.0 if share == 0 else fraction * share


def _unknown(rank: int) -> str:
    return (
        f"the first micro-batch of a step has `loss_weight` 0 on rank {rank}, so the number of its targets in the step"
        " is not known, and the loss is the mean over those of all processes: begin the step with a"
        " micro-batch that has targets, or call `program.step([first, second, ...])` with all of them"
    )
