"""What several processes read of a step is what one reads, and what they evaluate is what one evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from trainc.runtime.data.batch import Batch, WrongBatch
from trainc.runtime.data.evaluation import read_in_order
from trainc.runtime.data.parts import Part
from trainc.runtime.data.reader import make_reader
from trainc.runtime.sources.adapt import as_data

COUNT, MICRO = 23, 4


class Plain:
    """A split that counts what it reads."""

    def __init__(self, samples: int = 50) -> None:
        self.x, self.read = torch.arange(float(samples)), 0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> Batch:
        self.read += len(indices)
        rows = list(indices)
        return self.x[rows, None], self.x[rows].long()


class Augmented(Plain):
    """A split that draws random numbers for a whole batch."""

    def batch(self, indices: Sequence[int]) -> Batch:
        x, y = super().batch(indices)
        return x + torch.rand(len(x), 1), y


class Holding(Plain):
    """A split with a generator of its own, whose numbers depend on all that was read before."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def batch(self, indices: Sequence[int]) -> Batch:
        x, y = super().batch(indices)
        return x + torch.rand(len(x), 1, generator=self.generator), y


class Pair:
    tokens_per_sample = 1

    def __init__(self, kind: type[Plain], **more: Any) -> None:
        self.train, self.evaluation = kind(), kind()
        vars(self).update(more)


class Drawing(Dataset[Any]):
    """Samples of torch, each with random numbers of its own."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(1) + index, index


class Together(Drawing):
    """The same, of which several are drawn at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        return list(zip(torch.rand(len(indices), 1), indices, strict=True))


class Ordered(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((torch.rand(1) + i, i) for i in range(50))


def rows(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([torch.cat([x, y[:, None].to(x)], 1) for x, y in batches])


SOURCES: dict[str, Callable[[], Any]] = {
    "plain": lambda: Pair(Plain),
    "prefetched": lambda: Pair(Plain, prefetch=True),
    "augmented": lambda: Pair(Augmented),
    "with a generator of its own": lambda: Pair(Holding),
    "by workers": lambda: Pair(Plain, workers=1),
    "augmented by workers": lambda: Pair(Augmented, workers=1),
    "samples": lambda: as_data((Drawing(), Drawing())),
    "samples drawn together": lambda: as_data((Together(), Together())),
    "a stream": lambda: as_data((Ordered(), Ordered())),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_parts_of_all_processes_are_the_steps_of_one(name: str) -> None:
    steps = [(0, COUNT), (COUNT, COUNT), (2 * COUNT, COUNT + 4)]
    alone = make_reader(SOURCES[name](), 7)
    wanted = [rows(alone.read(first, count, MICRO)) for first, count in steps]
    alone.close()
    size = 2 if "workers" in name else 3
    found: list[list[Tensor]] = [[] for _ in steps]
    for rank in range(size):
        reader = make_reader(SOURCES[name](), 7, Part(rank, size))
        for own, (first, count) in zip(found, steps, strict=True):
            batches = reader.read(first, count, MICRO)
            assert max(len(y) for _, y in batches) <= MICRO
            own.append(rows(batches))
            if name != "a stream":
                ids = torch.cat(list(reader.sample_ids(first, count, MICRO)))
                assert torch.equal(ids, own[-1][:, 1].long())
            reader.ahead(first + count, count, MICRO)
        reader.close()
    for one, parts in zip(wanted, found, strict=True):
        assert torch.equal(torch.cat(parts), one)


@pytest.mark.parametrize("name", SOURCES)
def test_processes_that_train_apart_divide_one_order_over_their_own_steps(name: str) -> None:
    steps, size = [(0, COUNT - 3), (COUNT - 3, COUNT - 3), (2 * COUNT - 6, COUNT + 1)], 2
    alone = make_reader(SOURCES[name](), 7)
    wanted = [rows(alone.read(first * size, count * size, MICRO)) for first, count in steps]
    alone.close()
    found: list[list[Tensor]] = [[] for _ in steps]
    for rank in range(size):
        reader = make_reader(SOURCES[name](), 7, Part(rank, size, apart=True))
        for own, (first, count) in zip(found, steps, strict=True):
            batches = reader.read(first, count, MICRO)
            assert [len(y) for _, y in batches] == [MICRO] * (count // MICRO)
            own.append(rows(batches))
            if name != "a stream":
                ids = torch.cat(list(reader.sample_ids(first, count, MICRO)))
                assert torch.equal(ids, own[-1][:, 1].long())
            reader.ahead(first + count, count, MICRO)
        reader.close()
    for one, parts in zip(wanted, found, strict=True):
        assert torch.equal(torch.cat(parts), one)


def test_processes_that_train_apart_read_their_own_samples_alone() -> None:
    """Also where numbers are drawn for whole batches: a replica has batches, and numbers, of its own."""
    data = Pair(Augmented)
    reader = make_reader(data, 7, Part(1, 4, apart=True))
    for step in range(5):
        reader.read(step * 8, 8, 2)
    assert data.train.read == 40


def test_a_process_reads_no_more_than_its_part() -> None:
    data = Pair(Plain)
    reader = make_reader(data, 7, Part(1, 4))
    for step in range(5):
        reader.read(step * 8, 8, 2)
    assert data.train.read == 10


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("source", ["plain", "a stream", "by workers"])
def test_held_out_batches_are_divided_and_each_counts_once(source: str, size: int) -> None:
    if source == "by workers" and size > 2:
        return
    data = SOURCES[source]()
    alone = list(read_in_order(data.evaluation, 3, MICRO, 5, getattr(data, "workers", 0)))
    each = [
        list(
            read_in_order(
                data.evaluation, 3, MICRO, 5, getattr(data, "workers", 0), Part(rank, size)
            )
        )
        for rank in range(size)
    ]
    assert len({len(own) for own in each}) == 1  # as many passes in each process
    counted = sorted((one for own in each for one in own if one.counts), key=lambda one: one.number)
    assert [one.number for one in counted] == [0, 1, 2]
    assert torch.equal(rows([o.batch for o in counted]), rows([o.batch for o in alone]))


def test_a_step_with_fewer_samples_than_processes_is_refused() -> None:
    with pytest.raises(WrongBatch, match="a step of 3 samples cannot be divided over 4 processes"):
        make_reader(Pair(Plain), 7, Part(0, 4)).read(0, 3, 1)
