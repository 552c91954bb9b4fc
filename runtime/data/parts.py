"""The part of a step that one of several processes reads: neighbouring samples of the batch, in the order of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from trainc.runtime.data.batch import Batch, WrongBatch, map_tensors, one_of


@dataclass(frozen=True, slots=True)
class Part:
    """What one of `size` processes has of things in order: neighbours, of which all have as many but for one.

    Where they train `apart`, a step of the run is one of each of them, and its samples are those of all.
    """

    rank: int = 0
    size: int = 1
    apart: bool = False

    def whole(self, first: int, count: int) -> tuple[int, int]:
        """Return where in the run the samples of all processes begin, and how many they are, in a step of this one."""
        return (first * self.size, count * self.size) if self.apart else (first, count)

    def of(self, count: int) -> range:
        """Return which of `count` things are this process's."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def of_step(self, count: int) -> range:
        """Return which of a step's samples are this process's; raises WrongBatch where a process would have none."""
        if count < self.size:
            raise WrongBatch(
                f"a step of {count} samples cannot be divided over {self.size} processes: write a larger `batch`,"
                " which is that of all processes together, or start fewer processes"
            )
        return self.of(count)

    def largest(self, count: int) -> int:
        """Return how many things the process has that has most."""
        return -(-count // self.size)


WHOLE = Part()


def cut(batches: Sequence[Batch], own: range) -> list[Batch]:
    """Return what micro-batches hold of the samples `own` of their step, each as a micro-batch of its own."""
    found, first = [], 0
    for inputs, targets in batches:
        count = len(one_of(targets))
        rows = slice(max(own.start - first, 0), min(own.stop - first, count))
        if rows.start < rows.stop:
            take = itemgetter(rows)
            found.append((map_tensors(take, inputs), map_tensors(take, targets)))
        first += count
    return found
