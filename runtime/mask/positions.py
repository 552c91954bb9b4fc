"""Sorted positions of entries in a tensor, held where they take the least memory, and what others make of them."""

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


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a choice keeps of a gradient as soon as it arrives, in place of it.

    `finite` says whether all of it is; `positions` are what would be chosen by it, None where a score is not finite.
    """

    finite: bool
    positions: Positions | None


def staying(old: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the positions `index` (k,) were among the `old` ones, bool (k,), and where they stood there."""
    if old is None or not len(old):
        none = torch.zeros_like(index, dtype=torch.bool)
        return none, none.long()
    place = torch.searchsorted(old, index).clamp_(max=len(old) - 1)
    return old[place] == index, place


def carry(tensor: Tensor, first: Tensor | None, stays: Tensor, place: Tensor) -> None:
    """Make a vector of the entries of before one of those of now: new ones have what is in `first`, or 0.

    `stays` and `place`, (k,), are as `staying` returns them.
    """
    before = tensor.detach()
    fits = first is not None and first.shape == stays.shape and not first.is_sparse
    now = before.new_zeros(len(stays))
    if first is not None and fits:
        now.copy_(first.detach())
    now[stays] = before[place[stays]]
    tensor.data = now


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
