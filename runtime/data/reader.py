"""Read the micro-batches of a step, where asked ahead of time in a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.order import Data, Order, cut
from trainc.runtime.storage.random_streams import seed_data


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
