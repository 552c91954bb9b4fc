"""Read the micro-batches of a step, in a thread ahead of time where the data allows it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.order import Data, Order, split_indices
from trainc.runtime.storage.random_streams import seed_data


class Reader:
    """Reads the micro-batches of a step.

    Where the data has `prefetch = True`, a thread reads those of the next step during the current
    one. That promises that `batch` draws no random numbers from torch's global generators; without
    it they are seeded before each read, so that random augmentations are functions of the run too.
    """

    def __init__(self, data: Data, order: Order) -> None:
        self.split = data.train
        self.order = order
        self._pool = ThreadPoolExecutor(1, "read") if getattr(data, "prefetch", False) else None
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    @property
    def prefetches(self) -> bool:
        """Return whether `ahead` starts to read; otherwise it does nothing."""
        return self._pool is not None

    def read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        """Return the micro-batches of the step that begins at a sample of the run."""
        wanted = (first_sample, count, micro_size)
        ready, self._ahead = self._ahead, None
        if ready is not None:
            # Always wait for it: two threads must not use the order at once.
            batches = ready[1].result()
            if ready[0] == wanted:
                return batches
        if self._pool is None:
            seed_data(self.order.seed, first_sample)
        return self._read(*wanted)

    def ahead(self, first_sample: int, count: int, micro_size: int) -> None:
        """Begin to read the micro-batches that the next step is likely to need."""
        if self._pool is not None:
            wanted = (first_sample, count, micro_size)
            self._ahead = wanted, self._pool.submit(self._read, *wanted)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        indices = self.order.indices(first_sample, count)
        return [self.split.batch(part) for part in split_indices(indices, micro_size)]
