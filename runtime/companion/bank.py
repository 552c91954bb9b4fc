"""A bank: the last rows of a step's examples, first in, first out, kept by a companion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Bank(nn.Module):
    """Holds up to `size` rows of several columns, each a buffer (size, ...); the oldest make room for new ones.

    `columns` are empty rows, (0, ...), that give each column its shape and dtype. `count` is how many slots are filled,
    from the first on, and `next` the slot of the next row.
    """

    count: Tensor
    next: Tensor

    def __init__(self, size: int, columns: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.size, self.columns = size, tuple(columns)
        for name, empty in columns.items():
            self.register_buffer(name, empty.new_zeros(size, *empty.shape[1:]))
        for name in ("count", "next"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> Tensor:
        """Which slots hold a row, bool (size,)."""
        return torch.arange(self.size, device=self.count.device) < self.count

    @torch.no_grad()
    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Put in rows (N, ...) of every column, in order; of more than `size` only the last stay."""
        new = len(rows[self.columns[0]])
        kept = min(new, self.size)
        if not kept:
            return
        first = int(self.next) + new - kept
        slots = (torch.arange(kept, device=self.count.device) + first) % self.size
        for name in self.columns:
            held = self.get_buffer(name)
            held[slots] = rows[name][new - kept :].to(held)
        self.count.add_(new).clamp_(max=self.size)
        self.next.copy_((self.next + new) % self.size)
