"""What a norm's backward pass should take on a device, by a model of its launches: modelled, never measured.

Bytes at the copy rate, instructions at the rate at which they are issued, launches that wait for one another, and
loads that do. The counts are of kernels compiled for sm_90 without a device; rates and latencies are assumed. What the
model is for: to choose between launches, and to be refuted by a device.

  python -m benchmarks.offline.norm_model
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainc.kernels.library.grid import cdiv, power_of_2
from trainc.kernels.norm import tiles

RESULT = Path(__file__).parents[1] / "results" / "norm_model.json"
# Seconds: of a launch after another in a CUDA graph, until a program's first load, of a load that waits for another,
# until the programs of a kernel, and of each of its waves, are at work.
LAUNCH, FIRST, LOAD, RAMP, WAVE = 1.2e-6, 0.7e-6, 0.45e-6, 1.5e-6, 0.8e-6
# Of the instructions that a processor could issue, those it does; and seconds from a load to its data, by which
# the bytes follow that must be under way.
ISSUED, LATENCY = 0.75, 0.8e-6
# The fractions of the copy rate modelled alike for bfloat16 on an H100 when a backward pass was 7 launches.
BEFORE = {(8, 512, 768): 0.28, (64, 64, 4096): 0.58, (256, 8, 4096): 0.25}


@dataclass(frozen=True, slots=True)
class Device:
    """Rates of a device: bytes a second copied and read from the second cache, cycles a second, processors."""

    name: str
    copied: float
    clock: float
    cached: float = 5.5e12
    processors: int = 132


H100 = Device("H100", 3.0e12, 1.70e9)
H200 = Device("H200", 4.3e12, 1.75e9)


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel as compiled: instructions an element, programs a processor, tiles of a program that are under way."""

    instructions: float
    held: int
    ahead: int = 1


# By columns: LayerNorm in bfloat16 by Triton 3.9 for sm_90. A tile of `whole` is one that ends an example.
SPLIT = {1024: Form(24.6, 3), 2048: Form(21.3, 4), 4096: Form(21.6, 2), 8192: Form(21.8, 1)}
WHOLE = {1024: Form(27.6, 3, 2), 2048: Form(32.0, 3, 2), 4096: Form(32.3, 1, 2)}


@dataclass(frozen=True, slots=True)
class Modelled:
    """A backward pass: its regime, programs, chunks, seconds of both launches, and the fraction of the copy rate.

    The gap before the first launch is not counted.
    """

    regime: str
    programs: int
    chunks: int
    launches: int
    main: float
    finish: float
    fraction: float


def finish(
    examples: int, chunks: int, width: int, sums: int, squared: bool, device: Device
) -> float:
    """Seconds of the launch that adds partial rows (examples, chunks, width) of each sum."""
    step = tiles.finish(examples, chunks, width, sums, squared, device.processors)
    along = step.steps(examples, chunks, width, sums, False)
    waves = cdiv(cdiv(width, step.columns) * sums, device.processors)
    chain = along * waves + step.steps(examples, chunks, width, sums, squared) - along
    read = examples * chunks * width * 4 * sums / device.cached
    return LAUNCH + max(FIRST + chain * LOAD, read)


def backward(
    examples: int,
    rows: int,
    width: int,
    device: Device = H200,
    element: int = 2,
    sums: int = 2,
    split: Form | None = None,
    whole: Form | None = None,
) -> Modelled:
    """A backward pass with dx, gradients and norms over (examples, rows, width) elements of so many bytes.

    `split` and `whole` are the kernels' forms where the tables of this file do not hold.
    """
    tile = tiles.default("backward", power_of_2(width))
    columns = max(tile.columns, 1024)
    split = split or SPLIT[columns]
    whole = whole or WHOLE.get(columns)
    block = min(tile.rows, power_of_2(examples if rows == 1 else rows))
    slots = device.processors * split.held
    few = device.processors * whole.held if whole and 1 < rows < tiles.FEW_ROWS else 0
    config = tiles.launch_config(examples, rows, block, slots, few)
    form = whole if config.regime == "whole" and whole else split
    lanes = device.processors * form.held
    waves = cdiv(config.programs, lanes)
    if config.regime == "split":
        longest = waves * cdiv(cdiv(rows, config.chunks), block) * block
    elif config.regime == "whole":
        longest = cdiv(examples, config.programs) * cdiv(rows, block) * block
    else:
        longest = cdiv(cdiv(examples, config.programs), block) * block
    # Where some programs have more to do, or some find no place, the others' time is lost.
    lost = longest * lanes / (examples * rows)
    elements = examples * rows * width
    moved = 3 * element * elements
    under_way = form.held * form.ahead * block * tile.columns * 2 * element
    needed = device.copied * 2 / 3 * LATENCY / device.processors
    copying = moved / device.copied * max(1, lost) * max(1, needed / under_way)
    issuing = elements * tile.columns / width * form.instructions
    issuing /= device.processors * 4 * 32 * device.clock * ISSUED
    partial = config.programs * width * 4 * sums / device.cached / 2
    main = RAMP + WAVE * waves + max(copying, issuing) + partial
    squared = config.regime == "split"
    lines = (examples, config.chunks) if squared else (1, config.programs)
    last = finish(*lines, width, sums, squared, device)
    return Modelled(
        config.regime, config.programs, config.chunks, 2, main, last,
        moved / device.copied / (main + last),
    )  # fmt: skip


SHAPES = (
    (8, 512, 768), (64, 64, 4096), (256, 8, 4096), (1, 4096, 4096), (8, 2048, 4096), (64, 1024, 4096),
    (8, 2048, 1024), (16384, 1, 1024), (1024, 8, 4096), (100, 577, 1024), (8, 2048, 8192),
)  # fmt: skip


def report() -> list[dict[str, object]]:
    """Every shape on both devices, in bfloat16; what was modelled of the launches before, where it was."""
    return [
        {
            "device": device.name, "shape": list(shape), "modelled": asdict(backward(*shape, device)),
            "fraction before": BEFORE.get(shape) if device is H100 else None,
        }
        for device in (H100, H200)
        for shape in SHAPES
    ]  # fmt: skip


def main() -> None:
    """Print the report and keep it."""
    rows = report()
    RESULT.write_text(json.dumps({"measured": False, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row["device"], row["shape"], row["fraction before"], row["modelled"])


if __name__ == "__main__":
    main()
