"""Processes that read micro-batches ahead of time: the same numbers for any number of processes."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from trainc.runtime.data.batch import Batch, WrongBatch
from trainc.runtime.data.generators import find_generators
from trainc.runtime.data.order import (
    InOrder,
    Order,
    Split,
    read_batch_at,
    read_batch_noticing,
    split_indices,
)
from trainc.runtime.data.parts import WHOLE, Part

Place = tuple[int, int]
"""A micro-batch by its first sample's position in the run and its number of samples."""


class ReadFailed(RuntimeError):
    """The user's data raised an error in another process; the message has its traceback."""


@dataclass(frozen=True)
class _Task:
    position: int
    indices: list[int]


@dataclass(frozen=True)
class _Done:
    """What a process made of a task: a batch, or what it says of an error."""

    place: Place
    batch: Batch | None
    wrong: str | None = None
    failure: str | None = None
    drew: bool = False
    """Whether random numbers were drawn for the batch as a whole, if that was asked."""


class _Reading(Dataset[_Done]):
    """The tasks as a data set of torch, which the processes of a DataLoader read."""

    def __init__(self, split: Split, seed: int, *, noticing: bool) -> None:
        self.split, self.seed, self.noticing = split, seed, noticing

    def __getitem__(self, task: _Task) -> _Done:
        place = (task.position, len(task.indices))
        where = (self.split, task.indices, self.seed, task.position)
        try:
            if not self.noticing:
                return _Done(place, read_batch_at(*where))
            batch, drew = read_batch_noticing(*where)
            return _Done(place, batch, drew=drew)
        except WrongBatch as error:
            return _Done(place, None, wrong=str(error))
        except Exception as error:
            own = error.__traceback__.tb_next if error.__traceback__ else None
            text = "".join(traceback.format_exception(type(error), error, own))
            return _Done(place, None, failure=text)


class _Schedule(Sampler[_Task]):
    """The micro-batches of all steps from a place on, for steps of one size, up to `end` where there is one.

    Of each step they are those of this process's `part`.
    """

    def __init__(self, order: Order | InOrder, end: int | None, part: Part) -> None:
        self.order, self.end, self.part = order, end, part
        self.own, self.after, self.count, self.micro_size = range(1), 1, 1, 1
        """What to read of the first step, where it ends, and the sizes of the steps after it."""

    def __iter__(self) -> Iterator[_Task]:
        own, first = self.own, self.after
        while own:
            for part in split_indices(self.order.indices(own.start, len(own)), self.micro_size):
                yield _Task(own.start, list(part))
                own = own[len(part) :]
            count = self.count if self.end is None else max(0, min(self.count, self.end - first))
            numbers = self.part.of(count)
            own, first = range(first + numbers.start, first + numbers.stop), first + count


class Workers:
    """Reads micro-batches in processes of torch's DataLoader, which stay for the whole run.

    The processes work ahead on steps of the size of the last one. Where a step is another, they begin anew there.
    """

    def __init__(
        self,
        split: Split,
        order: Order | InOrder,
        count: int,
        end: int | None = None,
        part: Part = WHOLE,
    ) -> None:
        self._part, self.count = part, count
        self._schedule = _Schedule(order, end, part)
        self.drew = False
        """Whether random numbers were drawn for a batch as a whole; with several processes this is found out."""
        self._loader: DataLoader[_Done] | None = DataLoader(
            _Reading(split, order.seed, noticing=part.size > 1),
            batch_size=None,
            sampler=self._schedule,
            num_workers=count,
            collate_fn=_as_it_is,
            persistent_workers=True,
            worker_init_fn=_leave_signals,
            generator=torch.Generator().manual_seed(order.seed % 2**63),
        )
        self._done: Iterator[_Done] | None = None

    def read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        """Return the micro-batches of the step that begins at a sample of the run, or of this process's part of it."""
        numbers = self._part.of(count)
        own = range(first_sample + numbers.start, first_sample + numbers.stop)
        return [
            self._one(own[at:], first_sample + count, count, micro_size)
            for at in range(0, len(own), micro_size)
        ]

    def _one(self, own: range, after: int, count: int, micro_size: int) -> Batch:
        """Return the next micro-batch of `own`, what is left of a step that ends before `after`."""
        wanted = (own.start, min(micro_size, len(own)))
        done = None if self._done is None else next(self._done)
        if done is None or done.place != wanted:
            # The first step of a process, or one of another size than the step before.
            assert self._loader is not None
            schedule = self._schedule
            schedule.own, schedule.after = own, after
            schedule.count, schedule.micro_size = count, micro_size
            self._done = iter(self._loader)
            done = next(self._done)
        if done.wrong is not None:
            raise WrongBatch(done.wrong)
        if done.failure is not None:
            raise ReadFailed(f"a worker process failed to read the data:\n{done.failure}".rstrip())
        assert done.batch is not None
        self.drew |= done.drew
        return done.batch

    def close(self) -> None:
        """End the processes."""
        self._done = self._loader = None


def require_same_numbers(split: object) -> None:
    """Raise WrongBatch where random numbers would depend on which process reads what."""
    if not hasattr(split, "batch_at") and (generators := find_generators(split)):
        names = ", ".join(f"`{name}`" for name in generators)
        raise WrongBatch(
            f"`batch` of the data may draw from the generator {names}, of which each worker process would have one of"
            " its own: remove `workers`, draw from torch's, numpy's or Python's global generators, which are seeded for"
            " each batch, or give the data as a data set with `__getitem__`"
        )


def _as_it_is(done: Any) -> Any:
    return done


def _leave_signals(worker: int) -> None:
    """Let the process of the run alone decide what an interrupt means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
