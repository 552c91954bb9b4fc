"""A data set of single samples as a split: its batches, with random numbers that are functions of the position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.generators import (
    Generator,
    find_generators,
    seed_generators,
    states_of,
)
from trainc.runtime.sources.collate import Collation
from trainc.runtime.storage.random_streams import (
    derive_seed,
    global_states,
    same_states,
    seed_globals,
)


class Samples:
    """A data set with `len()` and `dataset[index]`, which gives one sample.

    `together`: `dataset.__getitems__(indices)` gives several samples at once, and is cheaper than one by one.
    """

    def __init__(self, dataset: Any, collation: Collation, *, together: bool = False) -> None:
        self.dataset, self.collation, self.together = dataset, collation, together
        self.draws_for_batches: bool | None = None
        """Whether random numbers were drawn for several samples at once, so that other batches have other numbers.

        None: nobody asks; set to False it is found out.
        """

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def generators(self) -> dict[str, Generator]:
        """The random generators that the data set holds, by name."""
        return find_generators(self.dataset)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return inputs and targets of the samples; random numbers come from where the generators are."""
        if self.together:
            return self.collation(self.dataset.__getitems__(list(indices)))
        return self.collation([self.dataset[index] for index in indices])

    def batch_at(self, indices: Sequence[int], seed: int, position: int) -> Batch:
        """Return the batch that begins at a position of the run.

        Each sample is read with global and held generators seeded by the seed and its own position, the collation by
        that of the first: so the numbers are the same whoever reads, in batches of any size.
        """
        samples: list[Any] = []
        if self.together:
            self._seed(seed, "samples", position)
            with self._noticing():
                samples = self.dataset.__getitems__(list(indices))
        for offset, index in enumerate(() if self.together else indices):
            self._seed(seed, "sample", position + offset)
            samples.append(self.dataset[index])
        self._seed(seed, "collate", position)
        with self._noticing():
            return self.collation(samples)

    def _seed(self, seed: int, purpose: str, position: int) -> None:
        derived = derive_seed(seed, purpose, position)
        seed_globals(derived)
        if self.generators:
            seed_generators(self.generators, derived)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Notice random numbers that are drawn in this block, if somebody asks and there were none before."""
        if self.draws_for_batches is not False:
            yield
            return
        before = global_states(), states_of(self.generators)
        yield
        self.draws_for_batches = not same_states(
            before, (global_states(), states_of(self.generators))
        )
