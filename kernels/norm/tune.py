"""Measure launch settings of the norm kernels on this device and keep the fastest, for `trainc tune`.

A candidate replaces the table's tile only if it computes the same and is faster by more than runs of
one tile differ. Tiles decide the order of sums, so tuned results differ in the last bits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from trainc.kernels.library.graph_capture import random_numbers_survive
from trainc.kernels.norm import tiles as table
from trainc.kernels.norm import tuned_tiles
from trainc.kernels.norm.tiles import Direction, Tile

DTYPES = (torch.bfloat16, torch.float32)
WIDTHS = (1024, 2048, 4096, 8192)
# Elements of a tensor: 256 MB in 16 bits, several times any cache.
ELEMENTS = 1 << 27
EXAMPLES = 8
GAIN = 0.03
THREAD_ELEMENTS = (8, 16, 32)
STAGES = (1, 2, 3)
# Warps that fit a processor at a thread's elements, for two float32 sums beside two inputs.
HELD_WARPS = {8: 24, 16: 16, 32: 12}

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class Measured:
    """The best tile found under a key, with its seconds and those of the table's tile."""

    key: str
    tile: Tile
    seconds: float
    before: float


def candidates(direction: Direction, columns: int) -> list[Tile]:
    """The table's tile, then those to compare with it."""
    first = table.default(direction, columns)
    found = [first]
    for each in THREAD_ELEMENTS:
        for warps in (4, 8, 16):
            rows = each * warps * 32 // columns
            if not 1 <= rows <= table.MOST_ROWS:
                continue
            if direction == "forward":
                found.append(Tile(rows, columns, warps))
                continue
            held = max(1, HELD_WARPS[each] // warps)
            found += [Tile(rows, columns, warps, stages, held) for stages in STAGES]
            found.append(Tile(rows, columns, warps, first.stages, held + 1))
    return list(dict.fromkeys(found))


def runner(
    direction: Direction, rms: bool, dtype: torch.dtype, columns: int, device: str, elements: int
) -> Callable[[Tile], tuple[Tensor, ...]]:
    """A function that runs the kernel with a tile on random data."""
    from trainc.kernels.norm import triton_norm_launch as kernels

    rows = max(1, elements // columns // EXAMPLES)
    x, dy = (torch.randn(EXAMPLES, rows, columns, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(columns, device=device).to(dtype) for _ in range(2))
    tail, shift = [columns], None if rms else bias
    if direction == "forward":
        return lambda tile: kernels.forward(x, tail, weight, shift, 1e-5, dtype, rms, tile=tile)[
            :: 2 if rms else 1
        ]
    _, mean, rstd = kernels.forward(x, tail, weight, shift, 1e-5, dtype, rms)
    given, mask = (weight, shift), [True, True, not rms]
    return lambda tile: kernels.backward(
        dy, x, tail, rstd if rms else mean, rstd, given, mask, rms, tile=tile
    )


def tune(
    timer: Timer,
    widths: Sequence[int] = WIDTHS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str = "cuda",
    elements: int = ELEMENTS,
) -> Iterator[Measured]:
    """Yield the best tile of every kernel, norm, dtype and width; `timer` returns the seconds of a call."""
    for columns in widths:
        for dtype in dtypes:
            for direction in get_args(Direction):
                for rms in (False, True):
                    run = runner(direction, rms, dtype, columns, device, elements)
                    key = tuned_tiles.key(direction, rms, dtype, columns)
                    yield _best(key, run, candidates(direction, columns), timer)


def _best(
    key: str, run: Callable[[Tile], tuple[Tensor, ...]], tiles: list[Tile], timer: Timer
) -> Measured:
    first, *others = tiles
    want = run(first)
    before = timer(lambda: run(first))
    best, least = first, before
    for tile in others:
        try:
            same = all(_close(a, b) for a, b in zip(run(tile), want, strict=True))
            spent = timer(lambda tile=tile: run(tile)) if same else before  # type: ignore[misc]
        except Exception as error:
            # Triton's own class, which an import here would need: a tile too large for the device.
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        if same and spent < least:
            best, least = tile, spent
    if best is not first:
        # The winner of many noisy runs looks better than it is: both are taken again.
        before, least = timer(lambda: run(first)), timer(lambda: run(best))
        if least > (1 - GAIN) * before:
            best, least = first, before
    return Measured(key, best, least, before)


def _close(a: Tensor, b: Tensor) -> bool:
    error = (a.float() - b.float()).norm()
    return bool(error <= 1e-2 * b.float().norm().clamp(min=1e-30))


def seconds(work: Callable[[], object]) -> float:
    """Median seconds of a call on the current CUDA device, from replays of a graph."""
    from triton.testing import do_bench_cudagraph

    with random_numbers_survive():
        return float(do_bench_cudagraph(work, return_mode="median")) / 1e3
