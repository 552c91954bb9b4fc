"""The order of the samples of a run: a pure function of the seed and the position in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.stream import Stream, require_count
from trainc.runtime.storage.random_streams import (
    global_states,
    permutation,
    same_states,
    seed_data,
)

# Entries of an epoch's order that are computed in one call, for many small batches.
BLOCK = 4096


class Split(Protocol):
    """A data set with random access."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return inputs and targets of the samples; the first axis counts the examples.

        The indices are the sample ids that clauses may read: an index is the same sample in every epoch.
        """


def read_batch(split: Split, indices: Sequence[int]) -> Batch:
    """Return the batch of some samples; raises WrongBatch, a TypeError, for anything else that the data gives."""
    return require_count(split.batch(indices), len(indices))


def read_batch_at(split: Split, indices: Sequence[int], seed: int, position: int) -> Batch:
    """Return the batch that begins at a position of the run, with random numbers that are functions of both.

    A split may have `batch_at(indices, seed, position)` for this; for others the global generators are seeded.
    """
    if (own := getattr(split, "batch_at", None)) is not None:
        return require_count(own(indices, seed, position), len(indices))
    seed_data(seed, position)
    return read_batch(split, indices)


def read_batch_noticing(
    split: Split, indices: Sequence[int], seed: int, position: int
) -> tuple[Batch, bool]:
    """Return what `read_batch_at` does, and whether random numbers were drawn for the batch as a whole.

    The samples of another batch then get other numbers. A split with `batch_at` finds it out where it has
    `draws_for_batches`, set to False by who asks.
    """
    if hasattr(split, "batch_at"):
        batch = read_batch_at(split, indices, seed, position)
        return batch, bool(getattr(split, "draws_for_batches", False))
    seed_data(seed, position)
    before = global_states()
    batch = read_batch(split, indices)
    return batch, not same_states(before, global_states())


class Data(Protocol):
    """The data that a data callable returns."""

    @property
    def train(self) -> Split | Stream:
        """Return the samples to train on."""

    @property
    def evaluation(self) -> Split | Stream | None:
        """Return the held-out samples."""

    @property
    def tokens_per_sample(self) -> int:
        """Return how many tokens a sample has; 1 where samples are not made of tokens."""


class Order:
    """The order of the samples over a run: each epoch is a new permutation.

    A batch at the end of an epoch continues into the next one, so no sample is dropped.
    """

    def __init__(self, seed: int, samples: int) -> None:
        if samples < 1:
            raise ValueError("the training data has no samples")
        self.seed = seed
        self.samples = samples
        self._block: tuple[int, int, list[int]] = (-1, -1, [])

    def indices(self, first_sample: int, count: int) -> list[int]:
        """Return the samples at positions `first_sample` to `first_sample + count` of the run."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first_sample + len(found), self.samples)
            block, offset = divmod(place, BLOCK)
            entries = self._entries(epoch, block)
            found += entries[offset : offset + count - len(found)]
        return found

    def _entries(self, epoch: int, block: int) -> list[int]:
        """Return one block of an epoch's order; the last one is cached."""
        if self._block[:2] != (epoch, block):
            start = block * BLOCK
            count = min(BLOCK, self.samples - start)
            entries = permutation(self.seed, epoch, self.samples, start, count).tolist()
            self._block = (epoch, block, entries)
        return self._block[2]


class InOrder:
    """The samples as they stand, as an evaluation reads them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def indices(self, first_sample: int, count: int) -> list[int]:
        """Return the samples from `first_sample` on."""
        return list(range(first_sample, first_sample + count))


def split_indices(indices: Sequence[int], micro_size: int) -> list[Sequence[int]]:
    """Split the samples of a step into micro-batches of `micro_size`; the last may be smaller."""
    if micro_size < 1:
        raise ValueError(
            f"micro_size = {micro_size}: expected at least one sample in a micro-batch"
        )
    return [indices[at : at + micro_size] for at in range(0, len(indices), micro_size)]
