"""Read the micro-batches of a step, by processes or in a thread ahead of time where the data says so."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.generators import find_generators, load_states, states_of
from trainc.runtime.data.order import (
    Data,
    Order,
    read_batch,
    read_batch_at,
    read_batch_noticing,
    split_indices,
)
from trainc.runtime.data.parts import WHOLE, Part, cut
from trainc.runtime.data.stream import StreamReader, is_stream, with_access
from trainc.runtime.data.workers import Workers, require_same_numbers
from trainc.runtime.storage.random_streams import global_states, same_states


class Reader:
    """Reads the micro-batches of a step.

    Where the data has `workers`, that many processes read ahead. Where it has `prefetch = True`, a thread reads those
    of the next step during the current one. That promises that `batch` draws no random numbers from global generators
    or from those that the data holds, which the first read checks; without it the global ones of torch, numpy and
    Python are seeded before each micro-batch, so that random augmentations are functions of the run too.

    One of several processes reads its `part` of each step alone. Where random numbers are drawn for micro-batches as a
    whole, it reads all of them and cuts them, so that the numbers are those of a run in one process. Processes that
    train apart have micro-batches of their own, and do so only where the data holds the generator.
    """

    def __init__(self, data: Data, order: Order, part: Part = WHOLE) -> None:
        self.split = with_access(data.train)
        self.order, self._part = order, part
        self.generators = find_generators(data)
        """Those that the data holds, by name."""
        self._cuts = False
        """Whether whole micro-batches are read and cut."""
        self._workers = None
        self._pool = None
        if part.size > 1 and hasattr(self.split, "draws_for_batches"):
            self.split.draws_for_batches = False
        if count := getattr(data, "workers", 0):
            for one in filter(None, (data.train, data.evaluation)):
                require_same_numbers(one)
            self._workers = Workers(self.split, order, count, part=part)
        elif getattr(data, "prefetch", False):
            self._pool = ThreadPoolExecutor(1, "read")
        elif part.size > 1:
            self._cuts = bool(self.generators) and not hasattr(self.split, "batch_at")
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    @property
    def prefetches(self) -> bool:
        """Return whether `ahead` starts to read; otherwise it does nothing."""
        return self._pool is not None

    def read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        """Return the micro-batches of the step that begins at a sample of the run, or this process's part of them."""
        first_sample, count = self._part.whole(first_sample, count)
        wanted = (first_sample, count, micro_size)
        if self._part.size == 1:
            return self._read_step(*wanted)
        own = self._part.of_step(count)
        if not self._cuts:
            if (found := self._read_part(*wanted, own)) is not None:
                return found
            self._cut_from_now()
        return cut(self._read_step(*wanted), own)

    def _cut_from_now(self) -> None:
        """Read whole micro-batches from now on."""
        self._cuts = True
        if self._workers is not None:
            self._workers.close()
            self._workers = Workers(self.split, self.order, self._workers.count)

    def _read_part(
        self, first_sample: int, count: int, micro_size: int, own: range
    ) -> list[Batch] | None:
        """Return the samples `own` of a step, read alone; None where random numbers are drawn for whole batches."""
        if self._workers is not None:
            batches = self._workers.read(first_sample, count, micro_size)
            return None if self._workers.drew and not self._part.apart else batches
        place = first_sample + own.start
        if self._pool is not None:
            return self._read_step(place, len(own), micro_size)
        found = []
        for indices in split_indices(self.order.indices(place, len(own)), micro_size):
            batch, drew = read_batch_noticing(self.split, indices, self.order.seed, place)
            if drew and not self._part.apart:
                return None
            found.append(batch)
            place += len(indices)
        return found

    def _read_step(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        wanted = (first_sample, count, micro_size)
        if self._workers is not None:
            return self._workers.read(*wanted)
        ready, self._ahead = self._ahead, None
        if ready is not None:
            # Always wait for it: two threads must not use the order at once.
            batches = ready[1].result()
            if ready[0] == wanted:
                return batches
        if self._pool is None:
            return self._read_seeded(*wanted)
        before = self._random_states()
        batches = self._read(*wanted)
        after = self._random_states()
        if drawn := [n for n, state in before.items() if not same_states(state, after[n])]:
            raise ValueError(
                f"the data has `prefetch = True`, but reading a batch draws random numbers from {', '.join(drawn)},"
                " which a thread does at another time in each run: set `prefetch = False`, or make the numbers of a"
                " sample a function of its index"
            )
        return batches

    def sample_ids(self, first_sample: int, count: int, micro_size: int) -> list[Tensor]:
        """Return which samples these micro-batches hold, as their indices in the training data.

        Call it between `read` and `ahead`, while the thread is at rest.
        """
        first_sample, count = self._part.whole(first_sample, count)
        own, first = self._part.of(count), 0
        found = []
        if not self._cuts:
            indices = self.order.indices(first_sample + own.start, len(own))
            return [torch.tensor(part) for part in split_indices(indices, micro_size)]
        for part in split_indices(self.order.indices(first_sample, count), micro_size):
            if ids := part[max(own.start - first, 0) : max(own.stop - first, 0)]:
                found.append(torch.tensor(ids))
            first += len(part)
        return found

    def _random_states(self) -> dict[str, Any]:
        """Return the states of the global generators and of those that the data holds, by name."""
        names = ("torch's generator", "numpy's `np.random`", "Python's `random`")
        found = dict(zip(names, global_states(), strict=True))
        return {**found, **{f"`{n}`": state for n, state in states_of(self.generators).items()}}

    def ahead(self, first_sample: int, count: int, micro_size: int) -> None:
        """Begin to read the micro-batches that the next step is likely to need."""
        if self._pool is not None:
            first_sample, count = self._part.whole(first_sample, count)
            own = self._part.of(count)
            wanted = (first_sample + own.start, len(own), micro_size)
            self._ahead = wanted, self._pool.submit(self._read, *wanted)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators that the data holds, as a checkpoint keeps them."""
        return {"generators": states_of(self.generators)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        load_states(self.generators, state["generators"])

    def close(self) -> None:
        """End the thread or the processes."""
        if self._workers is not None:
            self._workers.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read_seeded(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        parts = split_indices(self.order.indices(first_sample, count), micro_size)
        places = range(first_sample, first_sample + count, micro_size)
        return [
            read_batch_at(self.split, part, self.order.seed, place)
            for part, place in zip(parts, places, strict=True)
        ]

    def _read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        indices = self.order.indices(first_sample, count)
        return [read_batch(self.split, part) for part in split_indices(indices, micro_size)]


def make_reader(data: Data, seed: int, part: Part = WHOLE) -> Reader | StreamReader:
    """Return the reader of a run's training samples; one of several processes reads its `part` of each step."""
    samples = data.train
    if is_stream(samples):
        return StreamReader(data, samples, seed, part)
    return Reader(data, Order(seed, len(with_access(samples))), part)


def first_batch(data: Data, count: int, seed: int = 0) -> Batch:
    """Return the first training samples, at most `count`, as they stand."""
    part = data.train
    if is_stream(part):
        return next(part.from_start(count, seed))
    split = with_access(part)
    return read_batch(split, list(range(min(count, len(split)))))
