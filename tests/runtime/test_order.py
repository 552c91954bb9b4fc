"""The order of samples, and reading them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.data import order as module
from trainc.runtime.data.order import Order, split_indices
from trainc.runtime.data.reader import Reader


@given(samples=st.integers(1, 60), batches=st.lists(st.integers(1, 80), max_size=12))
def test_every_epoch_sees_every_sample_once(samples: int, batches: list[int]) -> None:
    order = Order(3, samples)
    seen: list[int] = []
    for batch in batches:
        seen += order.indices(len(seen), batch)
    for start in range(0, len(seen) - samples + 1, samples):
        assert sorted(seen[start : start + samples]) == list(range(samples))


@given(samples=st.integers(1, 60), first=st.integers(0, 500), count=st.integers(0, 100))
def test_a_batch_is_a_function_of_its_first_sample(samples: int, first: int, count: int) -> None:
    sequential = Order(3, samples).indices(0, first + count)
    assert Order(3, samples).indices(first, count) == sequential[first:]


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Order(1, 100).indices(0, 300)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert Order(1, 100).indices(0, 300) == whole


def test_epochs_differ() -> None:
    order = Order(1, 50)
    assert order.indices(0, 50) != order.indices(50, 50)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no samples"):
        Order(0, 0)


def test_a_step_is_cut_into_micro_batches() -> None:
    assert split_indices([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    with pytest.raises(ValueError, match="at least one sample"):
        split_indices([1], 0)


class Noisy:
    """A split whose samples are augmented with torch's random numbers."""

    def __len__(self) -> int:
        return 10

    def batch(self, indices: Any) -> tuple[Any, torch.Tensor]:
        index = torch.tensor(list(indices), dtype=torch.float32)
        return index + torch.rand(len(index)), index


def test_random_augmentation_is_a_function_of_the_run() -> None:
    data: Any = SimpleNamespace(train=Noisy(), evaluation=None, tokens_per_sample=1)
    first = Reader(data, Order(1, 10)).read(4, 6, 2)
    torch.rand(3)
    second = Reader(data, Order(1, 10)).read(4, 6, 2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


class Plain(Noisy):
    def batch(self, indices: Any) -> tuple[Any, torch.Tensor]:
        index = torch.tensor(list(indices))
        return index, index


@pytest.mark.parametrize("prefetch", [False, True])
def test_reading_ahead_changes_nothing(prefetch: bool) -> None:
    data: Any = SimpleNamespace(
        train=Plain(), evaluation=None, tokens_per_sample=1, prefetch=prefetch
    )
    order = Order(1, 10)
    reader = Reader(data, Order(1, 10))
    assert reader.prefetches == prefetch
    first = 0
    for guess, batch in [(4, 4), (4, 7), (7, 7), (3, 3)]:
        reader.ahead(first, guess, 2)
        batches = reader.read(first, batch, 2)
        assert torch.cat([inputs for inputs, _ in batches]).tolist() == order.indices(first, batch)
        first += batch
    reader.close()
