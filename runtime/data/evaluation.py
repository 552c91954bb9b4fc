"""Read held-out samples: the same batches in every evaluation, divided over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.order import InOrder, Split, read_batch_at
from trainc.runtime.data.parts import WHOLE, Part
from trainc.runtime.data.stream import Stream, is_stream, with_access
from trainc.runtime.data.workers import Workers


class HeldOut(NamedTuple):
    """A batch of held-out samples, and its number. One that does not count is another process's.

    All processes are given equally many, for where parameters are sharded they run each pass together.
    """

    number: int
    batch: Batch
    counts: bool = True


def read_in_order(
    samples: Split | Stream,
    batches: int,
    micro_size: int,
    seed: int,
    workers: int,
    part: Part = WHOLE,
) -> Iterator[HeldOut]:
    """Yield the first batches of some samples as they stand, all for 0, as functions of the seed.

    `part` says which of several batches this process evaluates. Of a stream it reads all.
    """
    if is_stream(samples):
        yield from _of_stream(islice(samples.from_start(micro_size, seed), batches or None), part)
        return
    split, order = with_access(samples), InOrder(seed)
    end = min(len(split), batches * micro_size or len(split))
    count = -(-end // micro_size)
    own = part.of(count)
    pool = Workers(split, order, workers, end) if workers and own else None
    try:
        for number in own:
            at = number * micro_size
            size = min(micro_size, end - at)
            if pool is not None:
                (batch,) = pool.read(at, size, micro_size)
            else:
                batch = read_batch_at(split, order.indices(at, size), seed, at)
            yield HeldOut(number, batch)
        if len(own) < part.largest(count):
            yield HeldOut(0, read_batch_at(split, order.indices(0, 1), seed, 0), counts=False)
    finally:
        if pool is not None:
            pool.close()


def _of_stream(every: Iterator[Batch], part: Part) -> Iterator[HeldOut]:
    """Yield one batch of as many as there are processes, round by round."""
    first = 0
    while turn := list(islice(every, part.size)):
        has = part.rank < len(turn)
        place = part.rank if has else 0
        yield HeldOut(first + place, turn[place], has)
        first += part.size
