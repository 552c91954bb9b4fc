"""The data sets and loaders of other libraries, where they are installed: what the doubles of the tests stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from tests.runtime.people import CLASSES, INPUTS, SAMPLES
from tests.runtime.test_sources import as_data, read, rows
from trainc.runtime.data.order import read_batch
from trainc.runtime.data.reader import make_reader

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]


class Drawn(Dataset[Any]):
    """Samples with random numbers in them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index] + torch.rand(()), int(CLASSES[index])


def hugging_face() -> Any:
    found = pytest.importorskip("datasets")
    return found.Dataset.from_dict({"x": INPUTS.tolist(), "label": CLASSES.tolist()})


def test_a_data_set_of_hugging_face() -> None:
    table = hugging_face()
    given = pytest.importorskip("datasets").DatasetDict(train=table, test=table.select(range(8)))
    data = as_data(given)
    assert (len(data.train), len(data.evaluation), data.tokens_per_sample) == (SAMPLES, 8, 1)
    inputs, targets = read_batch(data.train, [3, 1])
    torch.testing.assert_close(inputs, INPUTS[[3, 1]])
    assert torch.equal(targets, CLASSES[[3, 1]])
    assert torch.equal(rows(read(data, [16], 4)), rows(read(as_data(given, workers=1), [16], 4)))


def iterable() -> Any:
    return hugging_face().to_iterable_dataset(num_shards=4)


def shuffled() -> Any:
    return iterable().shuffle(seed=1, buffer_size=10)


def stateful() -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(Drawn(), batch_size=4, shuffle=True, drop_last=True)


def of_an_iterable() -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(iterable().with_format("torch"), batch_size=4)


@pytest.mark.parametrize("make", [iterable, shuffled, stateful, of_an_iterable])
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_position_is_restored_bit_for_bit(make: Any, steps: int) -> None:
    whole = make_reader(as_data(make()), 3)
    for i in range(steps):
        whole.read(8 * i, 8, 4)
    state = whole.state_dict()
    expected = [rows(whole.read(0, 8, 4)) for _ in range(8)]
    resumed = make_reader(as_data(make()), 3)
    resumed.load_state_dict(state)
    for found in expected:
        assert torch.equal(rows(resumed.read(0, 8, 4)), found)
