"""Data whose order is its own, and how a run reads it: from its position in the run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

from torch import Tensor

from trainc.runtime.data.batch import Batch, WrongBatch, check_batch, one_of
from trainc.runtime.data.generators import find_generators, load_states, states_of
from trainc.runtime.data.parts import WHOLE, Part, cut

if TYPE_CHECKING:
    from trainc.runtime.data.order import Data, Split


class Stream(Protocol):
    """Samples that come one after the other, in an order that nobody else knows."""

    @property
    def samples(self) -> int | None:
        """Return how many there are before it begins anew; None where that is not known."""

    def next_batch(self, size: int, seed: int) -> Batch:
        """Return the next samples of the run."""

    def from_start(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield all samples from the beginning once, in batches; those of the run stay where they are."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the run."""

    def load_state_dict(self, state: Mapping[str, Any], seed: int) -> None:
        """Go to a position in the run, from the beginning of the run."""


def is_stream(part: Split | Stream | None) -> TypeGuard[Stream]:
    """Say whether a part of the data has an order of its own."""
    return hasattr(part, "next_batch")


def count_samples(part: Split | Stream) -> int | None:
    """Return the number of samples of a part of the data; None for a stream that does not know it."""
    return part.samples if is_stream(part) else len(with_access(part))


def with_access(part: Split | Stream) -> Split:
    """Return a part of the data that is no stream."""
    return cast("Split", part)


class StreamReader:
    """Reads the micro-batches of a step from a stream; `next_batch` of it says what is random."""

    prefetches = False

    def __init__(self, data: Data, stream: Stream, seed: int, part: Part = WHOLE) -> None:
        self.stream, self.seed, self._part = stream, seed, part
        self.generators = find_generators(data)
        """Those that the data holds, by name."""

    def read(self, first_sample: int, count: int, micro_size: int) -> list[Batch]:
        """Return the micro-batches of the next step; one of several processes reads all and keeps its part."""
        _, count = self._part.whole(first_sample, count)
        own = self._part.of_step(count)
        batches = [
            require_count(self.stream.next_batch(size, self.seed), size)
            for size in (min(micro_size, count - at) for at in range(0, count, micro_size))
        ]
        return batches if self._part.size == 1 else cut(batches, own)

    def sample_ids(self, first_sample: int, count: int, micro_size: int) -> list[Tensor]:
        """Raise WrongBatch: nothing numbers the samples of a stream."""
        raise WrongBatch(
            "a clause reads which samples a step holds, and the samples of a stream have no numbers: give a data set"
            " with `__len__` and `__getitem__`"
        )

    def ahead(self, first_sample: int, count: int, micro_size: int) -> None:
        """Do nothing: a stream that reads ahead does so itself."""

    def close(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream and the states of generators, as a checkpoint keeps them."""
        return {"generators": states_of(self.generators), "stream": self.stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.stream.load_state_dict(state["stream"], self.seed)
        load_states(self.generators, state["generators"])


def require_count(batch: object, count: int) -> Batch:
    """Return a batch of `count` samples; raises WrongBatch for another one."""
    inputs, targets = check_batch(batch)
    one = one_of(targets)
    if not one.dim() or len(one) != count:
        raise WrongBatch(
            f"`batch` was asked for {count} samples and gave targets of shape {tuple(one.shape)}: expected"
            f" ({count}, ...), since the first axis counts the samples"
        )
    return inputs, targets
