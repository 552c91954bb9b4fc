"""Tables of numbers on a device, for kernels that take many tensors: addresses, sizes and where each begins.

A table holds a few numbers a tensor, however large the tensors are: a program finds its tensor by halving. Its memory
on the device is a call's own, and free afterwards: a call may run in the memory pool of a CUDA graph that is yet to be
captured, and what outlived it there would be overwritten. The host's `Numbers` may be kept and sent again. While a
graph is captured a table is written by kernels that bring the numbers with them: a replay finds no host memory.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.launch import launch

# Numbers that one launch writes.
TOGETHER = 8
ALIGNMENT = 16


@triton.jit(do_not_specialize=[f"n{place}" for place in range(TOGETHER)] + ["at"])
def write(
    TABLE, at: tl.int64, n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64,
    n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
):  # fmt: skip
    """Grid (1,): eight numbers from a place on."""
    tl.store(TABLE + at, n0)
    tl.store(TABLE + at + 1, n1)
    tl.store(TABLE + at + 2, n2)
    tl.store(TABLE + at + 3, n3)
    tl.store(TABLE + at + 4, n4)
    tl.store(TABLE + at + 5, n5)
    tl.store(TABLE + at + 6, n6)
    tl.store(TABLE + at + 7, n7)


@triton.jit
def owner_of(ENDS, pid, tensors):
    """The tensor that a program belongs to: the last of those that begin with it or before; some may be empty."""
    low, high = pid * 0, pid * 0 + tensors
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(ENDS + middle) <= pid
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


class Numbers:
    """A table's numbers, and the host's memory that they are sent from, which nothing ever changes."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self._sent_from: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The numbers as int64 in fresh memory of the device, without waiting for it."""
        cuda = device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            return written(self.numbers, device)
        if self._sent_from is None:
            # A copy from memory that is not pinned waits for the stream.
            self._sent_from = torch.tensor(self.numbers, dtype=torch.int64, pin_memory=cuda)
        return self._sent_from.to(device, non_blocking=True, copy=True)


def written(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers as int64, and zeros behind them, put there by kernels alone."""
    padded = [*numbers, *[0] * (-len(numbers) % TOGETHER)]
    found = torch.empty(len(padded), dtype=torch.int64, device=device)
    for start in range(0, len(padded), TOGETHER):
        launch(write, (1,), found, start, *padded[start : start + TOGETHER], num_warps=1)
    return found


def aligned(addresses: Iterable[int]) -> bool:
    """Whether all that starts at these addresses can be loaded 16 bytes at a time."""
    return all(address % ALIGNMENT == 0 for address in addresses)


def pieces(size: int, piece: int) -> int:
    """How many pieces hold `size` entries; `triton.cdiv` takes two microseconds, and tables are of many tensors."""
    return -(-size // piece)
