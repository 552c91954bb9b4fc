"""How the Triton norm kernels are launched: tiles, warps, programs and regimes.

Choices come from the tables below, reasoned from registers and bytes in flight, so that no step of a user's run is
spent searching. What `trainc tune` measured on a device replaces them there (`tuned_tiles`). docs/kernels.md has the
reasons.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from trainc.kernels.library.grid import cdiv, power_of_2

Direction = Literal["forward", "backward"]
Regime = Literal["rows", "whole", "split"]

# Forward walks along wider rows twice. Backward holds two float32 sums and both inputs of a row in
# registers up to HELD columns (16 warps, 119 registers); beyond it spills, so reads inputs twice.
MAX_WIDTH = 16384
HELD = 8192
# A partial row is written and read in float32 for weight and bias: this many 16-bit rows' traffic.
PARTIAL_ROWS = 3
# Below this many rows an example, partial rows would add a sixth or more to the traffic, so a
# program takes whole examples where there is one for every program that runs at once.
FEW_ROWS = 16
# What a program of `norm_finish` loads at once of partial rows, its warps, the chunks that a thread adds by itself, and
# the columns of a block: at least a sector.
FINISH_ELEMENTS, FINISH_WARPS, FINISH_UNROLL = 8192, 8, 8
FINISH_LEAST, FINISH_MOST = 8, 128


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns a program holds, its warps, load stages, and programs a processor is given at once.

    Where `resident` is 0, as many as the compiled kernel's registers and shared memory let a processor hold.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    resident: int = 0


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """A regime of the backward pass, the programs launched and the chunks of an example."""

    regime: Regime
    programs: int
    chunks: int


# columns: rows, warps, stages. Some 16 elements a thread where rows are wide and 32 where several
# rows share a reduction. Two stages copy the next tile while this one is reduced, the only overlap
# where one or two programs fit a processor.
BACKWARD = {1024: (4, 4, 2), 2048: (1, 4, 2), 4096: (1, 8, 2), HELD: (1, 16, 2)}
# Forward keeps nothing between rows: a program a tile, and the more of them the better.
FORWARD = {1024: (4, 4), 2048: (2, 4), 4096: (1, 8), 8192: (1, 8), MAX_WIDTH: (1, 16)}
MOST_ROWS = 16


def default(direction: Direction, columns: int) -> Tile:
    """The table's tile for a power of two of columns."""
    if direction == "forward":
        rows, warps = FORWARD[max(columns, 1024)]
        return Tile(_narrow(rows, columns), columns, warps)
    rows, warps, stages = BACKWARD[max(columns, 1024)]
    return Tile(_narrow(rows, columns), columns, warps, stages)


def _narrow(rows: int, columns: int) -> int:
    return rows if columns >= 1024 else min(MOST_ROWS, rows * 1024 // columns)


@lru_cache(maxsize=1024)
def launch_config(
    examples: int, rows: int, block: int, slots: int, whole_slots: int = 0
) -> LaunchConfig:
    """How to cut (examples, rows) into programs that never mix two examples.

    `block` is the rows of a tile, `slots` the programs that run at once, `whole_slots` those of the form `whole`, 0
    where it does not serve. Chunks are as many as cost least, counted in tiles walked one after another, with partial
    rows converted to tiles.
    """
    if rows == 1:
        # Each row is an example: its square is its own, and only the batch's sum is partial.
        return LaunchConfig("rows", min(slots, cdiv(examples, block)), 1)
    if rows < FEW_ROWS and examples >= whole_slots > 0:
        # As even as can be, in one wave: a program's partial row is the price of a program.
        return LaunchConfig("whole", cdiv(examples, cdiv(examples, whole_slots)), 1)
    most = min(cdiv(rows, block), max(1, cdiv(4 * slots, examples)))

    def cost(chunks: int) -> float:
        waves, length = cdiv(examples * chunks, slots), cdiv(rows, chunks)
        return waves * cdiv(length, block) + PARTIAL_ROWS / block * examples * chunks / slots

    chunks = min(range(1, most + 1), key=cost)
    chunks = cdiv(rows, cdiv(rows, chunks))
    return LaunchConfig("split", examples * chunks, chunks)


@dataclass(frozen=True, slots=True)
class Finish:
    """A step of `norm_finish`: loads of a thread, and each time examples, chunks of each and columns.

    Then lines and blocks of the squares.
    """

    unroll: int
    examples: int
    chunks: int
    columns: int
    lines: int
    blocks: int

    @property
    def warps(self) -> int:
        """Four numbers a thread at each load, so that they are read as one."""
        return max(1, min(FINISH_WARPS, self.examples * self.chunks * self.columns // 128))

    def steps(self, examples: int, chunks: int, width: int, sums: int, squared: bool) -> int:
        """Loads that wait for one another, in a program of the grid and in the one that adds the squares."""
        steps = cdiv(examples, self.examples) * cdiv(chunks, self.chunks * self.unroll)
        blocks = cdiv(width, self.columns)
        last = cdiv(examples * sums, self.lines) * cdiv(blocks, self.blocks)
        return steps + (last if squared else 0)


@lru_cache(maxsize=1024)
def finish(
    examples: int, chunks: int, width: int, sums: int, squared: bool, processors: int
) -> Finish:
    """The step of `norm_finish` with the shortest chain of loads, a program on every processor at a time.

    Partial rows are (examples, chunks, width) for each of the `sums`. Narrow blocks of columns take more of the lines
    at once, and leave more squares to the program that adds them.
    """

    def made(columns: int) -> Finish:
        unroll = min(power_of_2(chunks), FINISH_UNROLL)
        held = FINISH_ELEMENTS // columns // unroll
        some = min(power_of_2(cdiv(chunks, unroll)), held)
        blocks = min(power_of_2(cdiv(width, columns)), FINISH_ELEMENTS // 2)
        lines = min(power_of_2(examples * sums), FINISH_ELEMENTS // 2 // blocks)
        each = min(power_of_2(examples), held // some)
        return Finish(unroll, each, some, columns, lines, blocks)

    def cost(step: Finish) -> tuple[int, int]:
        waves = cdiv(cdiv(width, step.columns) * sums, processors)
        last = step.steps(examples, chunks, width, sums, squared)
        return last + (waves - 1) * step.steps(examples, chunks, width, sums, False), step.columns

    widths = (1 << power for power in range(FINISH_MOST.bit_length()))
    return min((made(columns) for columns in widths if columns >= FINISH_LEAST), key=cost)
