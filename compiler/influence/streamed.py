"""Samples of a stream by number: sample i is the i-th that the stream gives from its beginning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch, split_batch
from trainc.runtime.data.order import Data, Split
from trainc.runtime.data.stream import Stream, is_stream, with_access
from trainc.runtime.storage.random_streams import derive_seed, seeded


class StreamedSamples:
    """The first samples of a stream, read as far as they are asked for, and kept.

    They are those of the first pass of the run, with the random numbers of its seed. `alone` says whether some are of
    other shapes, so that they make no batch together.
    """

    def __init__(self, stream: Stream, seed: int) -> None:
        self._stream, self._seed = stream, seed
        self._coming: Iterator[Batch] | None = None
        self._kept: list[Batch] = []
        self.alone = False

    def has(self, number: int) -> bool:
        """Read up to a sample, and say whether there is one of this number."""
        with seeded(derive_seed(self._seed, "pass", 0)):
            if self._coming is None:
                self._coming = iter(self._stream.from_start(1, self._seed))
            while len(self._kept) <= number and (batch := next(self._coming, None)) is not None:
                self._kept += split_batch(batch, 1)
        self.alone = len({_shapes(one) for one in self._kept}) > 1
        return number < len(self._kept)

    def __len__(self) -> int:
        """Return how many samples were read."""
        return len(self._kept)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return samples of these numbers, which were read."""
        found = [self._kept[i] for i in indices]
        return (
            found[0]
            if len(found) == 1
            else (_joined([x for x, _ in found]), _joined([y for _, y in found]))
        )


class NumberedData:
    """Data whose streams are read by number."""

    def __init__(self, data: Data, seed: int) -> None:
        self.train = _numbered(data.train, seed)
        self.evaluation = None if data.evaluation is None else _numbered(data.evaluation, seed)
        self.tokens_per_sample = data.tokens_per_sample
        self.decode = getattr(data, "decode", None)


def _numbered(part: Split | Stream, seed: int) -> Split | StreamedSamples:
    return StreamedSamples(part, seed) if is_stream(part) else with_access(part)


def _joined(parts: Sequence[Any]) -> Any:
    """Return the same tensors of several samples as those of a batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([*parts])
    if isinstance(first, dict):
        return {name: _joined([one[name] for one in parts]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(_joined(some) for some in zip(*parts, strict=True))
    return first


def _shapes(value: Any) -> Any:
    """Return the shapes of all tensors, as what can be compared."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    values = value.values() if isinstance(value, dict) else value
    return tuple(map(_shapes, values)) if isinstance(value, dict | tuple | list) else ()
