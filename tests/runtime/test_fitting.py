"""The number of samples in a pass that fits, found by halving."""

from __future__ import annotations

import pytest
import torch

from trainc.runtime.memory.failure import OutOfMemory
from trainc.runtime.memory.fitting import FittingSize


class Attempts:
    """Passes of which those of more than `fits` samples fail; it counts what was tried and undone."""

    def __init__(self, fits: int, whole: int, error: Exception | None = None) -> None:
        self.fits, self.whole, self.error = fits, whole, error
        self.tried: list[int] = []
        self.undone = 0

    def __call__(self, size: int | None) -> str:
        samples = min(size or self.whole, self.whole)
        self.tried.append(samples)
        if samples > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.error is not None:
            raise self.error
        return f"done with {samples}"

    def undo(self) -> None:
        self.undone += 1

    def run(self, size: FittingSize, *, alone: bool = True) -> str:
        return size.run(self, self.undo, self.whole, alone=alone)


@pytest.mark.parametrize(
    ("whole", "fits", "tried"),
    [(8, 8, [8]), (8, 7, [8, 4]), (10, 2, [10, 5, 3, 2]), (7, 1, [7, 4, 2, 1]), (2, 1, [2, 1])],
)
def test_each_failure_halves_the_samples(whole: int, fits: int, tried: list[int]) -> None:
    size, attempts = FittingSize(goes_on=True), Attempts(fits, whole)
    assert attempts.run(size) == f"done with {tried[-1]}"
    assert attempts.tried == tried
    assert attempts.undone == len(tried) - 1
    assert size.size == (None if len(tried) == 1 else tried[-1])
    assert bool(size.news(5)) == (len(tried) > 1)
    assert size.news(6) is None
    again = Attempts(fits, whole)
    again.run(size)
    assert again.tried == tried[-1:]


def test_what_is_found_for_an_error_message_is_undone_too() -> None:
    size, attempts = FittingSize(goes_on=False), Attempts(3, 8)
    with pytest.raises(OutOfMemory, match="Passes of 2 samples fit"):
        attempts.run(size)
    assert (attempts.tried, attempts.undone, size.size) == ([8, 4, 2], 3, None)
    assert size.state_dict() is None


def test_other_processes_wait_so_nothing_else_is_tried() -> None:
    attempts = Attempts(3, 8)
    with pytest.raises(OutOfMemory, match="Several processes train together"):
        attempts.run(FittingSize(goes_on=True), alone=False)
    assert attempts.tried == [8]


def test_an_error_of_smaller_passes_is_named_beside_that_of_memory() -> None:
    cause = ValueError("cannot be divided into ghost batches of 8")
    with pytest.raises(OutOfMemory, match=r"8 samples ran out .* ghost batches of 8") as found:
        Attempts(4, 8, cause).run(FittingSize(goes_on=True))
    assert found.value.__cause__ is cause


def test_an_error_that_is_none_of_memory_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="no"):
        Attempts(8, 8, ValueError("no")).run(FittingSize(goes_on=True))


def test_a_state_counts_only_where_it_may() -> None:
    one = FittingSize(goes_on=True)
    Attempts(2, 8).run(one)
    one.news(3)
    for goes_on, expected in ((True, 2), (False, None)):
        other = FittingSize(goes_on=goes_on)
        other.load_state_dict(one.state_dict())
        assert other.size == expected
        assert bool(other.summary()) == goes_on
