"""Windows of token sequences as samples: the target of each token is the token after it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[Any]


class Shard:
    """A file of tokens, without a header, that is mapped into memory when it is first read."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        size = path.stat().st_size
        if size % self.dtype.itemsize:
            raise ValueError(
                f"{path} has {size} bytes, which is not a whole number of {dtype}: write its `dtype`, or remove its"
                " header"
            )
        self.length = size // self.dtype.itemsize

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens, which are read from the file as they are used."""
        return np.memmap(self.path, self.dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping out: another process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


class InMemory:
    """Tokens that are in memory."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens, self.length = tokens, len(tokens)


class Windows:
    """Consecutive windows of `context` tokens and the one after; none reaches over the end of a sequence."""

    def __init__(
        self, sequences: Sequence[Shard | InMemory], context: int, part: slice = slice(None)
    ) -> None:
        self.sequences, self.context = sequences, context
        counts = [count_windows(one.length, context) for one in sequences]
        self._ends = list(accumulate(counts))
        self._samples = range(self._ends[-1] if counts else 0)[part]

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ids (B, context) and the ids after each of them (B, context)."""
        rows = torch.from_numpy(np.stack([self._row(self._samples[i]) for i in indices]))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _row(self, window: int) -> Tokens:
        at = bisect_right(self._ends, window)
        first = (window - (self._ends[at - 1] if at else 0)) * self.context
        return self.sequences[at].tokens[first : first + self.context + 1].astype(np.int64)


def count_windows(length: int, context: int) -> int:
    """Return how many windows of `context` tokens, each with a token after it, a sequence of this length has."""
    return max(0, (length - 1) // context)


def split_windows(samples: int, fraction: float) -> int:
    """Return how many of the samples train where the last fraction of them is held out; at least one is held out."""
    return samples - max(1, round(samples * fraction)) if fraction else samples


@dataclass(frozen=True)
class TokenData:
    """Windows to train on, and held-out ones; reading them draws no random numbers.

    `decode` returns the text of some ids, where that is known.
    """

    train: Windows
    evaluation: Windows | None
    tokens_per_sample: int
    fingerprint: str
    workers: int = 0
    prefetch: bool = True
    decode: Callable[[Sequence[int]], str] | None = None


def token_data(
    train: Sequence[Shard | InMemory],
    held_out: Sequence[Shard | InMemory],
    fraction: float,
    context: int,
    fingerprint: str,
    workers: int = 0,
) -> TokenData:
    """Return the data of token sequences; the last `fraction` of the windows of `train` is held out, or `held_out`."""
    whole = Windows(train, context)
    evaluation = Windows(held_out, context) if held_out else None
    if fraction:
        middle = split_windows(len(whole), fraction)
        whole, evaluation = (
            Windows(train, context, part) for part in (slice(middle), slice(middle, None))
        )
    return TokenData(whole, evaluation, context, fingerprint, workers)
