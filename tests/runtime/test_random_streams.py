"""Randomness as a function of seed, purpose and counters."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.storage.random_streams import (
    derive_seed,
    permutation,
    seed_data,
    seed_step,
    seeded,
)


def test_derived_seeds_never_change() -> None:
    # Changing them would change every run that is resumed with a newer version.
    assert derive_seed(7) == 0x6A7D81F300F283B
    assert derive_seed(7, "order", 3) == 0xA8EF3E18F1222795


def test_derived_seeds_differ_by_the_parts_of_the_purpose() -> None:
    found = {
        derive_seed(1, "a", 2),
        derive_seed(1, "a", 3),
        derive_seed(2, "a", 2),
        derive_seed(1, "a2"),
        derive_seed(1, "a", "2"),
        derive_seed(1, 2, "a"),
        derive_seed(1, "a", 2, 0),
    }
    assert len(found) == 7


@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 3000))
def test_an_order_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert sorted(permutation(seed, epoch, n, 0, n).tolist()) == list(range(n))


@given(st.data(), st.integers(1, 500))
def test_a_slice_of_an_order_is_that_of_the_full_order(data: st.DataObject, n: int) -> None:
    start = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - start))
    whole = permutation(3, 1, n, 0, n)
    assert (permutation(3, 1, n, start, count) == whole[start : start + count]).all()


def test_a_slice_of_a_huge_order_is_computed_directly() -> None:
    n = 10**15
    found = permutation(1, 0, n, n - 1000, 1000)
    assert len(set(found.tolist())) == 1000
    assert 0 <= found.min() <= found.max() < n
    # Spread out: the mean of uniform draws, to within five standard errors.
    assert abs(found.mean() / n - 0.5) < 5 / np.sqrt(12 * 1000)


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(permutation(seed, epoch, 20, 0, 20)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_small_set_are_equally_likely(n: int) -> None:
    draws = 4800
    found = Counter(tuple(permutation(seed, 0, n, 0, n)) for seed in range(draws))
    kinds = {2: 2, 3: 6, 4: 24}[n]
    assert len(found) == kinds
    expected = draws / kinds
    chi = sum((count - expected) ** 2 / expected for count in found.values())
    # Mean and variance of chi squared are its degrees of freedom and twice that.
    assert chi < kinds - 1 + 5 * np.sqrt(2 * (kinds - 1))


def test_neighbours_land_apart() -> None:
    found = permutation(5, 0, 10_000, 0, 10_000)
    steps = np.diff(found)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert len(np.unique(steps)) > 5000


def test_entries_outside_an_order_are_refused() -> None:
    with pytest.raises(ValueError, match="entries 5 to 11"):
        permutation(0, 0, 10, 5, 6)


def test_seeding_torch_is_a_function_of_the_step() -> None:
    def draw(step: int, micro: int) -> list[float]:
        seed_step(7, step, micro)
        return torch.rand(4).tolist()

    assert draw(3, 0) == draw(3, 0)
    assert len({tuple(draw(step, micro)) for step in range(3) for micro in range(3)}) == 9
    seed_data(7, 3)
    assert torch.rand(4).tolist() != draw(3, 0)


def test_seeding_covers_numpy_and_python_and_is_undone_by_the_block() -> None:
    def draw() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    seed_step(7, 1, 0)
    first = draw()
    with seeded(2**64 - 1):
        inside = draw()
    after = draw()
    seed_step(7, 1, 0)
    assert draw() == first
    assert draw() == after
    with seeded(2**64 - 1):
        assert draw() == inside
    seed_data(7, 1)
    assert not set(draw()) & set(first)
