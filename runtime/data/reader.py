"""Which samples a step sees: a pure function of the seed and the number of samples seen before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from trainc.runtime.storage.random_streams import permutation, seed_data

Batch = tuple[Any, Tensor]

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


class Reader:
    """Reads the micro-batches of a step.

    Where the data says `prefetch = True` the next step's are read in a thread meanwhile. That is a
    promise that `batch` draws no random numbers from torch's global generators; without it they are
    seeded before each step's reading, so that random augmentations are functions of the run too.
    """

    def __init__(self, data: Data, order: Order) -> None:
        self.split = data.train
        self.order = order
        self._pool = ThreadPoolExecutor(1, "read") if getattr(data, "prefetch", False) else None
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    @property
    def prefetches(self) -> bool:
        """Say whether `ahead` does anything."""
        return self._pool is not None

    def read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        """Return the micro-batches of the step that begins at a sample of the run."""
        wanted = (first_sample, count, micro_size)
        ready, self._ahead = self._ahead, None
        if ready is not None:
            # Always waited for: the order is not made for two threads.
            batches = ready[1].result()
            if ready[0] == wanted:
                return batches
        if self._pool is None:
            seed_data(self.order.seed, first_sample)
        return self._read(*wanted)

    def ahead(self, first_sample: int, count: int, micro_size: int) -> None:
        """Begin to read what the next step is likely to ask for."""
        if self._pool is not None:
            wanted = (first_sample, count, micro_size)
            self._ahead = wanted, self._pool.submit(self._read, *wanted)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        indices = self.order.indices(first_sample, count)
        return [self.split.batch(part) for part in cut(indices, micro_size)]


def target_count(targets: Tensor, ignore_index: int = -100) -> int:
    """Return how many targets a loss averages over: whole ones but `ignore_index`, else all."""
    if targets.is_floating_point() or targets.is_complex():
        return targets.numel()
    return int((targets != ignore_index).sum())
