"""Data with an order of its own: read as it comes, and from any position on as if it had never stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.runtime.people import CLASSES, INPUTS, SAMPLES, Table, table
from tests.runtime.test_sources import as_data, rows
from trainc.runtime.data.batch import WrongBatch
from trainc.runtime.data.evaluation import read_in_order
from trainc.runtime.data.reader import first_batch, make_reader
from trainc.runtime.sources.adapt import WrongData


class Plain(IterableDataset[Any]):
    """Samples in an order that another generator draws for each pass, and with random numbers in them."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.begun = 0

    def order(self) -> list[int]:
        return [int(i) for i in self.rng.permutation(SAMPLES)]

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        for i in self.order():
            yield INPUTS[i] + torch.rand(()), int(CLASSES[i])


class Numbered(Plain):
    """One whose passes are functions of their number."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        return [int(i) for i in np.random.default_rng(self.epoch).permutation(SAMPLES)]

    def __len__(self) -> int:
        return SAMPLES


class Stateful(Plain):
    """One that says where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.passed = 0, 0

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng(self.passed).permutation(SAMPLES)
        while self.at < SAMPLES:
            i = int(order[self.at])
            self.at += 1
            yield INPUTS[i] + torch.rand(()), int(CLASSES[i])
        self.at, self.passed = 0, self.passed + 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "passed": self.passed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.passed = state["at"], state["passed"]


class Drawing(Stateful):
    """One that draws a number when a pass begins, also in the midst of it."""

    def __iter__(self) -> Iterator[Any]:
        torch.rand(())
        return super().__iter__()


class Loader:
    """What a StatefulDataLoader can do: batches in its own order, and where it is."""

    def __init__(self, batch_size: int = 4, drop_last: bool = True) -> None:
        self.samples = Stateful()
        self.batch_size, self.drop_last = batch_size, drop_last

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.samples)
        while found := list(itertools.islice(samples, self.batch_size)):
            if len(found) == self.batch_size or not self.drop_last:
                yield [torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found])]

    def __len__(self) -> int:
        return SAMPLES // self.batch_size

    def state_dict(self) -> dict[str, int]:
        return self.samples.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples.load_state_dict(state)


class Columns:
    """What an IterableDataset of Hugging Face's `datasets` can do."""

    column_names = ("x", "label")

    def __init__(self, rows: Table) -> None:
        self.rows = rows

    def with_format(self, kind: str) -> Columns:
        return Columns(self.rows.with_format(kind))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


KINDS: dict[str, Any] = {
    "plain": Plain,
    "numbered": Numbered,
    "stateful": Stateful,
    "drawing": Drawing,
    "a loader": Loader,
    "a loader of an iterable": lambda: DataLoader(Plain(), batch_size=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 5, 7, 12])
def test_a_position_is_restored_bit_for_bit(kind: str, steps: int) -> None:
    whole = make_reader(as_data(KINDS[kind]()), 3)
    before = [whole.read(8 * i, 8, 4) for i in range(steps)]
    state = whole.state_dict()
    expected = [whole.read(8 * (steps + i), 8, 4) for i in range(7)]
    assert len(before) == steps
    resumed = make_reader(as_data(KINDS[kind]()), 3)
    resumed.load_state_dict(state)
    for i, batches in enumerate(expected):
        assert torch.equal(rows(resumed.read(8 * (steps + i), 8, 4)), rows(batches))
    assert {len(y) for _, y in expected[0]} == {4}


def test_a_pass_that_is_over_is_followed_by_the_next() -> None:
    reader = make_reader(as_data(Numbered()), 3)
    read = rows(reader.read(0, 3 * SAMPLES, 8))[:, -1]
    orders = [np.random.default_rng(n).permutation(SAMPLES) for n in range(3)]
    assert torch.equal(read, torch.cat([CLASSES[torch.from_numpy(o)] for o in orders]).float())


def test_a_pass_with_a_number_is_not_read_again_from_the_first() -> None:
    given = Numbered()
    reader = make_reader(as_data(given), 3)
    reader.read(0, 5 * SAMPLES + 8, 8)
    state, fresh = reader.state_dict(), Numbered()
    again = make_reader(as_data(fresh), 3)
    before = fresh.begun
    again.load_state_dict(state)
    assert (fresh.begun - before, fresh.epoch) == (1, 5)


def test_the_state_of_a_table_that_may_lack_its_buffer_is_not_trusted() -> None:
    given: Any = Columns(table())
    given.state_dict = given.load_state_dict = lambda *_: pytest.fail("its state was used")
    reader = make_reader(as_data(given), 0)
    reader.read(0, 8, 8)
    again = make_reader(as_data(Columns(table())), 0)
    again.load_state_dict(reader.state_dict())
    torch.testing.assert_close(rows(again.read(8, 4, 4))[:, :4], INPUTS[8:12])


def test_the_data_set_of_a_loader_is_told_the_pass() -> None:
    loader: Any = Loader()
    loader.dataset = Numbered()
    make_reader(as_data(loader), 3).read(0, 2 * SAMPLES + 4, 4)
    assert loader.dataset.epoch == 2


def test_columns_are_read_as_tensors() -> None:
    data = as_data(Columns(table()))
    (batch,) = make_reader(data, 0).read(0, 5, 5)
    torch.testing.assert_close(batch[0], INPUTS[:5])
    torch.testing.assert_close(first_batch(data, 3)[0], INPUTS[:3])


@pytest.mark.parametrize("kind", ["numbered", "a loader"])
def test_an_evaluation_is_the_same_every_time_and_moves_nothing(kind: str) -> None:
    if kind == "a loader":
        data: Any = as_data((Numbered(), [(INPUTS[i], 0) for i in range(8)]))
    else:
        data = as_data((Numbered(), Numbered()))
    reader = make_reader(data, 3)
    reader.read(0, 8, 4)
    found = [
        rows([one.batch for one in read_in_order(data.evaluation, 2, 4, 9, 0)]) for _ in range(2)
    ]
    assert torch.equal(*found)
    assert len(found[0]) == 8
    twin = make_reader(as_data(Numbered()), 3)
    twin.read(0, 8, 4)
    assert torch.equal(rows(reader.read(8, 8, 4)), rows(twin.read(8, 8, 4)))


def test_a_whole_evaluation() -> None:
    data = as_data((Numbered(), Numbered()))
    assert len(rows([one.batch for one in read_in_order(data.evaluation, 0, 16, 9, 0)])) == SAMPLES


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (Loader(8), "gave a batch of 8 samples where a micro-batch has 4"),
        (Loader(16, drop_last=False), "`drop_last=True`"),
    ],
)
def test_batches_of_another_size(loader: Loader, said: str) -> None:
    reader = make_reader(as_data(loader), 3)
    with pytest.raises(WrongBatch) as error:
        reader.read(0, 4, 4)
    assert said in str(error.value)


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_what_is_refused() -> None:
    with pytest.raises(WrongData, match="`train` is a generator, which can be read once"):
        as_data({"train": (x for x in [(INPUTS[0], 0)])})
    with pytest.raises(WrongData, match="it has no samples"):
        as_data(Empty())
    with pytest.raises(WrongData, match="an iterable has an order of its own: remove `workers`"):
        as_data(Plain(), workers=2)
    with pytest.raises(WrongBatch, match="the samples of a stream have no numbers"):
        make_reader(as_data(Plain()), 3).sample_ids(0, 4, 4)
