"""The order of the samples: a pure function of the seed and the number of samples seen before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trainc.runtime.data.batch import Batch
from trainc.runtime.storage.random_streams import permutation

# Entries of an epoch's order that are computed at once: one call serves many small batches.
BLOCK = 4096


class Split(Protocol):
    """A data set with random access."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return inputs and targets of the samples, example axis first."""
        ...


class Data(Protocol):
    """What a data callable returns."""

    @property
    def train(self) -> Split:
        """Return the samples to train on."""
        ...

    @property
    def evaluation(self) -> Split | None:
        """Return the held-out samples."""
        ...

    @property
    def tokens_per_sample(self) -> int:
        """Return how many tokens a sample counts for; 1 where it means nothing."""
        ...


class Order:
    """The order of samples over a run: each epoch a new permutation, epochs joined without a gap.

    A batch at the end of an epoch is filled from the next one, so no sample is dropped.
    """

    def __init__(self, seed: int, samples: int) -> None:
        if samples < 1:
            raise ValueError("there are no samples to train on")
        self.seed = seed
        self.samples = samples
        self._block: tuple[int, int, list[int]] = (-1, -1, [])

    def indices(self, first_sample: int, count: int) -> list[int]:
        """Return the samples that stand at `first_sample` to `first_sample + count` of the run."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first_sample + len(found), self.samples)
            block, offset = divmod(place, BLOCK)
            entries = self._entries(epoch, block)
            found += entries[offset : offset + count - len(found)]
        return found

    def _entries(self, epoch: int, block: int) -> list[int]:
        """Return one block of an epoch's order; the last one asked for is kept."""
        if self._block[:2] != (epoch, block):
            start = block * BLOCK
            count = min(BLOCK, self.samples - start)
            entries = permutation(self.seed, epoch, self.samples, start, count).tolist()
            self._block = (epoch, block, entries)
        return self._block[2]


def cut(indices: Sequence[int], micro_size: int) -> list[Sequence[int]]:
    """Cut the samples of a step into micro-batches of `micro_size`; the last may be smaller."""
    if micro_size < 1:
        raise ValueError(f"a micro-batch has at least one sample, not {micro_size}")
    return [indices[at : at + micro_size] for at in range(0, len(indices), micro_size)]
