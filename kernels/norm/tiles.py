"""How the Triton norm kernels are launched: tiles, warps, programs and regimes.

Choices come from the tables below, reasoned from registers and bytes in flight, so that no step of a user's run is
spent searching. What `trainc tune` measured on a device replaces them there (`tuned_tiles`). docs/kernels.md has the
reasons.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from trainc.kernels.library.grid import cdiv

Direction = Literal["forward", "backward"]
Regime = Literal["rows", "whole", "split"]

# Forward walks along wider rows twice. Backward holds two float32 sums and both inputs of a row in
# registers up to HELD columns (16 warps, 119 registers); beyond it spills, so reads inputs twice.
MAX_WIDTH = 16384
HELD = 8192
# A partial row is written and read in float32 for weight and bias: this many 16-bit rows' traffic.
PARTIAL_ROWS = 3
# Below this many rows an example, partial rows would add a sixth or more to the traffic, so a
# program takes whole examples where there are enough. Its two more sums cost a processor a third of
# its programs, so several waves of them are launched, which even out.
FEW_ROWS = 16
WHOLE_WAVES = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns a program holds, its warps, load stages, and programs a processor holds."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    resident: int = 1


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """A regime of the backward pass, the programs launched and the chunks of an example."""

    regime: Regime
    programs: int
    chunks: int


# columns: rows, warps, stages, and resident for 16 and for 32 bits. Some 16 elements a thread where
# rows are wide and 32 where several rows share a reduction. Two stages copy the next tile while
# this one is reduced, the only overlap where one or two programs fit a processor. `resident` is
# what 65536 registers hold (tests compile and compare): more would run as a second, short wave.
BACKWARD = {
    1024: (4, 4, 2, 3, 2),
    2048: (1, 4, 2, 4, 3),
    4096: (1, 8, 2, 2, 1),
    HELD: (1, 16, 2, 1, 1),
}
# Forward keeps nothing between rows: a program a tile, and the more of them the better.
FORWARD = {1024: (4, 4), 2048: (2, 4), 4096: (1, 8), 8192: (1, 8), MAX_WIDTH: (1, 16)}
MOST_ROWS = 16


def default(direction: Direction, dtype: torch.dtype, columns: int) -> Tile:
    """The table's tile for a power of two of columns."""
    if direction == "forward":
        rows, warps = FORWARD[max(columns, 1024)]
        return Tile(_narrow(rows, columns), columns, warps)
    rows, warps, stages, *resident = BACKWARD[max(columns, 1024)]
    held = resident[dtype == torch.float32]
    return Tile(_narrow(rows, columns), columns, warps, stages, held)


def _narrow(rows: int, columns: int) -> int:
    return rows if columns >= 1024 else min(MOST_ROWS, rows * 1024 // columns)


@lru_cache(maxsize=1024)
def launch_config(
    examples: int, rows: int, block: int, slots: int, few: int = FEW_ROWS
) -> LaunchConfig:
    """How to cut (examples, rows) into programs that never mix two examples.

    `block` is the rows of a tile, `slots` the programs that run at once. Chunks are as many as cost
    least, counted in tiles walked one after another, with partial rows converted to tiles.
    """
    if rows == 1:
        # Each row is an example: its square is its own, and only the batch's sum is partial.
        return LaunchConfig("rows", min(slots, cdiv(examples, block)), 1)
    if rows < few and examples >= slots:
        return LaunchConfig("whole", min(examples, WHOLE_WAVES * slots), 1)
    most = min(cdiv(rows, block), max(1, cdiv(4 * slots, examples)))

    def cost(chunks: int) -> float:
        waves, length = cdiv(examples * chunks, slots), cdiv(rows, chunks)
        return waves * cdiv(length, block) + PARTIAL_ROWS / block * examples * chunks / slots

    chunks = min(range(1, most + 1), key=cost)
    chunks = cdiv(rows, cdiv(rows, chunks))
    return LaunchConfig("split", examples * chunks, chunks)
