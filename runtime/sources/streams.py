"""Data sets and loaders whose order is their own: their samples one after the other, and their position in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count, islice
from typing import Any

from trainc.runtime.data.batch import Batch, WrongBatch, one_of
from trainc.runtime.sources.collate import Collation
from trainc.runtime.storage.random_streams import derive_seed, seed_globals


class Passes:
    """What an iterable gives, pass after pass, from a position on that can be saved.

    An iterable with `state_dict()` and `load_state_dict()` says itself where it is. Any other is read again up to the
    position: from the beginning of the pass where it has `set_epoch`, which makes a pass a function of its number, else
    from the beginning of the run. Global generators are seeded before each item by its number in the run.
    """

    def __init__(self, iterable: Any, *, exact_state: bool = True) -> None:
        self.iterable = iterable
        own = all(hasattr(iterable, name) for name in ("state_dict", "load_state_dict"))
        self.stateful = own and exact_state
        self.passed, self.items, self.in_pass = 0, 0, 0
        self._iterator: Iterator[Any] | None = None

    def next(self, seed: int) -> Any:
        """Return the next item, of the next pass where one is over; raises WrongBatch where a pass has none."""
        while True:
            if self._iterator is None:
                seed_globals(derive_seed(seed, "pass", self.passed))
                self._iterator = self._begin(self.passed)
            # After the beginning, which may draw numbers, and which a resumed run has in the midst of a pass.
            seed_globals(derive_seed(seed, "stream", self.items))
            try:
                item = next(self._iterator)
            except StopIteration:
                if not self.in_pass:
                    kind = type(self.iterable).__name__
                    raise WrongBatch(
                        f"a {kind} gave no sample in a pass from its beginning"
                    ) from None
                self.passed, self.in_pass, self._iterator = self.passed + 1, 0, None
                continue
            self.items, self.in_pass = self.items + 1, self.in_pass + 1
            return item

    def _begin(self, number: int) -> Iterator[Any]:
        for one in (self.iterable, getattr(self.iterable, "dataset", None)):
            if callable(set_epoch := getattr(one, "set_epoch", None)):
                set_epoch(number)
        return iter(self.iterable)

    def once(self, seed: int) -> Iterator[Any]:
        """Yield the items of one pass from the beginning."""
        iterator = iter(self.iterable)
        for number in count():
            seed_globals(derive_seed(seed, "stream", number))
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        own = self.iterable.state_dict() if self.stateful and self._iterator is not None else None
        return {"passed": self.passed, "items": self.items, "in_pass": self.in_pass, "own": own}

    def load_state_dict(self, state: Mapping[str, Any], seed: int) -> None:
        """Go to a position, by its own state or by reading up to it."""
        self._iterator = None
        if state["own"] is not None:
            self.iterable.load_state_dict(state["own"])
            self.passed, self.items, self.in_pass = (
                state[name] for name in ("passed", "items", "in_pass")
            )
            return
        by_number = callable(getattr(self.iterable, "set_epoch", None))
        self.passed = state["passed"] if by_number else 0
        self.items, self.in_pass = state["items"] - state["in_pass"] if by_number else 0, 0
        while self.items < state["items"]:
            self.next(seed)


class SampleStream:
    """An iterable of samples, collated into batches.

    Without `exact_state` its position is read up to again, although it has a `state_dict` of its own.
    """

    def __init__(self, iterable: Any, collation: Collation, *, exact_state: bool = True) -> None:
        self.passes, self.collation = Passes(iterable, exact_state=exact_state), collation

    @property
    def samples(self) -> int | None:
        """How many samples a pass has, if the iterable has a length."""
        return _length(self.passes.iterable)

    def next_batch(self, size: int, seed: int) -> Batch:
        """Return the next samples."""
        samples = [self.passes.next(seed) for _ in range(size)]
        seed_globals(derive_seed(seed, "collate", self.passes.items))
        return self.collation(samples)

    def from_start(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of one pass from the beginning; the last may be smaller."""
        samples = self.passes.once(seed)
        while found := list(islice(samples, size)):
            yield self.collation(found)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self.passes.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], seed: int) -> None:
        """Go to a position."""
        self.passes.load_state_dict(state, seed)


class BatchStream:
    """A loader of batches that says itself where it is; its batches are the micro-batches of the run."""

    def __init__(self, name: str, loader: Any, collation: Collation) -> None:
        self.name, self.passes, self.collation = name, Passes(loader), collation

    @property
    def samples(self) -> int | None:
        """How many samples a pass has, if the loader knows its batches and their size."""
        loader = self.passes.iterable
        batches, size = _length(loader), getattr(loader, "batch_size", None)
        return None if batches is None or size is None else batches * size

    def next_batch(self, size: int, seed: int) -> Batch:
        """Return the next batch; raises WrongBatch where it is of another size."""
        batch = self.collation.divide(self.passes.next(seed), "a batch of the loader is")
        if (found := len(one_of(batch[1]))) != size:
            raise WrongBatch(
                f"`{self.name}` is a loader with an order of its own, and gave a batch of {found} samples where a"
                f" micro-batch has {size}: write the loader's batch size as `micro` in the `data` clause, and give the"
                " loader `drop_last=True`"
            )
        return batch

    def from_start(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield the batches of one pass from the beginning, of whatever size."""
        for item in self.passes.once(seed):
            yield self.collation.divide(item, "a batch of the loader is")

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self.passes.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], seed: int) -> None:
        """Go to a position."""
        self.passes.load_state_dict(state, seed)


def _length(iterable: Any) -> int | None:
    with suppress(TypeError, NotImplementedError):
        return len(iterable)
    return None
