"""Sorted positions of entries in a tensor, where they take the least memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 16
"""The positions that 16 bits tell apart."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Sorted positions (k,) below `numel`: `offsets` in blocks of 65536, uint16 (k,), `counts` of each block, int32.

    Without `counts`, `offsets` are the positions, int32, or int64 where `numel` needs it.
    """

    offsets: Tensor
    counts: Tensor | None
    numel: int

    @classmethod
    def of(cls, index: Tensor, numel: int) -> Positions:
        """Return positions that are sorted and distinct, of any integer dtype, where they take the least memory."""
        index = index.to(_integer(numel))
        if not _is_less(len(index), numel) or index.device.type not in ("cpu", "cuda"):
            return cls(index, None, numel)
        counts = torch.bincount(index.bitwise_right_shift(16), minlength=_blocks(numel)).int()
        return cls(index.bitwise_and(BLOCK - 1).to(torch.uint16), counts, numel)

    def index(self) -> Tensor:
        """Return them as int32 (k,), or int64 where `numel` needs it."""
        if self.counts is None:
            return self.offsets
        dtype = _integer(self.numel)
        starts = torch.arange(
            0, len(self.counts) * BLOCK, BLOCK, dtype=dtype, device=self.counts.device
        )
        first = torch.repeat_interleave(starts, self.counts, output_size=len(self.offsets))
        return first.add_(self.offsets.to(dtype))

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + (0 if self.counts is None else self.counts.nbytes)


def size_of(count: int, numel: int) -> int:
    """Return the bytes of so many positions below `numel`."""
    if _is_less(count, numel):
        return 2 * count + 4 * _blocks(numel)
    return count * _integer(numel).itemsize


def _is_less(count: int, numel: int) -> bool:
    """Say whether offsets in blocks take less than integers."""
    return 2 * count + 4 * _blocks(numel) < count * _integer(numel).itemsize


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _integer(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64
