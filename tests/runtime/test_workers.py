"""Worker processes: the same batches for any number of them, from any place on; errors come back whole."""

from __future__ import annotations

import itertools
import multiprocessing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.runtime.people import SAMPLES, Augmented, Pairs
from tests.runtime.test_sources import Own, as_data, read, rows
from trainc.runtime.data.batch import WrongBatch
from trainc.runtime.data.evaluation import read_in_order
from trainc.runtime.data.reader import make_reader
from trainc.runtime.data.workers import ReadFailed

SIZES = [8, 8, 12, 12, 5, 5, 8, 30]


class Noisy(Own):
    """A split that draws from global generators."""

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch(indices)
        return inputs + torch.rand(()) + float(np.random.rand()), targets


class Holding(Noisy):
    """A split with a generator of its own."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__(pairs)
        self.rng = np.random.default_rng(0)


GIVEN = {"samples": Augmented, "a split": lambda: {"train": Noisy(Pairs()), "val": Noisy(Pairs())}}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(given: Any, workers: int) -> None:
    alone = read(as_data(given()), SIZES, 4)
    by_workers = read(as_data(given(), workers=workers), SIZES, 4)
    assert [len(y) for _, y in by_workers] == [len(y) for _, y in alone]
    assert torch.equal(rows(by_workers), rows(alone))
    later = read(as_data(given(), workers=workers), SIZES[3:], 4, first=sum(SIZES[:3]))
    assert torch.equal(rows(later), rows(alone)[sum(SIZES[:3]) :])


def test_workers_leave_the_random_numbers_of_the_run_alone() -> None:
    reader = make_reader(as_data(Augmented(), workers=1), 3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reader.read(0, 8, 4)
    found = torch.rand(3)
    reader.close()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("samples", [10, 12])
def test_evaluation_by_workers_is_evaluation_without(samples: int) -> None:
    found = [
        rows([b.batch for b in read_in_order(as_data(Augmented(samples)).train, 0, 4, 9, workers)])
        for workers in (0, 2)
    ]
    assert len(found[0]) == samples
    assert torch.equal(*found)


class Broken(Pairs):
    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise KeyError("no image 17")
        return super().__getitem__(index)


class Ragged(Pairs):
    def __getitem__(self, index: int) -> Any:
        return torch.ones(1 + (index == 17)), 0


def test_an_error_in_a_worker_comes_back_with_the_users_traceback() -> None:
    with pytest.raises(ReadFailed) as error:
        read(as_data(Broken(), workers=2), [SAMPLES], 4)
    text = str(error.value)
    assert "a worker process failed to read the data" in text
    assert 'raise KeyError("no image 17")' in text
    assert __file__ in text


def test_wrong_samples_in_a_worker_are_told_as_without_workers() -> None:
    said = []
    for workers in (0, 1):
        with pytest.raises(WrongBatch, match="samples of one batch differ") as error:
            read(as_data(Ragged(), workers=workers), [SAMPLES], 4)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_generator_that_each_worker_would_have_its_own_of_is_refused() -> None:
    given = SimpleNamespace(train=Holding(Pairs()), evaluation=None, tokens_per_sample=1)
    read(as_data(given), [4], 4)
    with pytest.raises(
        WrongBatch, match=r"may draw from the generator `data.rng`.*remove `workers`"
    ):
        make_reader(as_data(given, workers=1), 3)


def test_no_process_is_left_behind() -> None:
    before = set(multiprocessing.active_children())
    given = as_data((Augmented(), Augmented()), workers=2)
    read(given, [8, 12], 4)
    list(itertools.islice(read_in_order(given.evaluation, 0, 4, 9, 2), 2))  # given up in the midst
    assert set(multiprocessing.active_children()) <= before
