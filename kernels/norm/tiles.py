"""How the Triton norm kernels are launched: tiles, warps, programs and regimes.

Choices come from the tables below, reasoned from registers and bytes in flight, so that no step of
a user's run is spent searching. What `trainc tune` measured on a device replaces them there.
docs/kernels.md has the reasons in full.
"""

import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["forward", "backward"]
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
class Plan:
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


def power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def chosen(
    kind: Kind, rms: bool, dtype: torch.dtype, rows: int, width: int, device: torch.device
) -> Tile:
    """The tile for rows of this width, tuned where `trainc tune` ran on the device."""
    columns = power_of_2(width)
    tile = tuned(device).get(key(kind, rms, dtype, columns)) or default(kind, dtype, columns)
    fewer = min(tile.rows, power_of_2(max(rows, 1)))
    return Tile(fewer, columns, tile.warps, tile.stages, tile.resident)


def default(kind: Kind, dtype: torch.dtype, columns: int) -> Tile:
    """The table's tile for a power of two of columns."""
    if kind == "forward":
        rows, warps = FORWARD[max(columns, 1024)]
        return Tile(_narrow(rows, columns), columns, warps)
    rows, warps, stages, *resident = BACKWARD[max(columns, 1024)]
    held = resident[dtype == torch.float32]
    return Tile(_narrow(rows, columns), columns, warps, stages, held)


def _narrow(rows: int, columns: int) -> int:
    return rows if columns >= 1024 else min(MOST_ROWS, rows * 1024 // columns)


def programs(device: torch.device, resident: int) -> int:
    """How many programs the device holds at once."""
    if device.type != "cuda":
        return resident
    return resident * int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=1024)
def plan(examples: int, rows: int, block: int, slots: int, few: int = FEW_ROWS) -> Plan:
    """How to cut (examples, rows) into programs that never mix two examples.

    `block` is the rows of a tile, `slots` the programs that run at once. Chunks are as many as cost
    least, counted in tiles walked one after another, with partial rows converted to tiles.
    """
    if rows == 1:
        # Each row is an example: its square is its own, and only the batch's sum is partial.
        return Plan("rows", min(slots, cdiv(examples, block)), 1)
    if rows < few and examples >= slots:
        return Plan("whole", min(examples, WHOLE_WAVES * slots), 1)
    most = min(cdiv(rows, block), max(1, cdiv(4 * slots, examples)))

    def cost(chunks: int) -> float:
        waves, length = cdiv(examples * chunks, slots), cdiv(rows, chunks)
        return waves * cdiv(length, block) + PARTIAL_ROWS / block * examples * chunks / slots

    chunks = min(range(1, most + 1), key=cost)
    chunks = cdiv(rows, cdiv(rows, chunks))
    return Plan("split", examples * chunks, chunks)


def key(kind: Kind, rms: bool, dtype: torch.dtype, columns: int) -> str:
    """What a tuned tile is stored under."""
    norm = "rms" if rms else "layer"
    return f"{kind} {norm} {str(dtype).removeprefix('torch.')} {columns}"


def cache_file() -> Path:
    """Where tuned tiles are kept: launch.json in $TRAINC_CACHE, or in the user's cache folder."""
    if folder := os.environ.get("TRAINC_CACHE"):
        return Path(folder) / "launch.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainc/launch.json"


def tuned(device: torch.device) -> dict[str, Tile]:
    """The tuned tiles of a device by key; none for what is not CUDA."""
    return _tuned(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


@lru_cache(maxsize=16)
def _tuned(device: str) -> dict[str, Tile]:
    try:
        entries = read_cache().get(device, {})
        return {name: Tile(**entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        # A damaged cache costs speed, not results.
        warnings.warn(f"{cache_file()} is ignored: {error}", stacklevel=2)
        return {}


def read_cache() -> dict[str, Any]:
    """The whole cache: tiles by key by device name; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads(cache_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def store(device: str, tiles: dict[str, Tile]) -> Path:
    """Add the tiles of a device to the cache; other devices' stay."""
    path = cache_file()
    found = read_cache()
    found[device] = {**found.get(device, {}), **{name: asdict(t) for name, t in tiles.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    _tuned.cache_clear()
    return path
