"""The tile of a launch: the one that `trainc tune` saved for this device, or else the table's."""

import json
import os
import warnings
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trainc.kernels.library import atomic
from trainc.kernels.library.grid import power_of_2
from trainc.kernels.norm.tiles import Direction, Tile, default


def choose(
    direction: Direction, rms: bool, dtype: torch.dtype, rows: int, width: int, device: torch.device
) -> Tile:
    """The tile for rows of this width, tuned where `trainc tune` ran on the device."""
    columns = power_of_2(width)
    found = tuned(device).get(key(direction, rms, dtype, columns))
    tile = found or default(direction, columns)
    fewer = min(tile.rows, power_of_2(max(rows, 1)))
    return Tile(fewer, columns, tile.warps, tile.stages, tile.resident)


def key(direction: Direction, rms: bool, dtype: torch.dtype, columns: int) -> str:
    """The name a tuned tile is stored under."""
    norm = "rms" if rms else "layer"
    return f"{direction} {norm} {str(dtype).removeprefix('torch.')} {columns}"


def cache_file() -> Path:
    """Where tuned tiles are kept: launch.json in $TRAINC_CACHE, or in the user's cache folder."""
    if folder := os.environ.get("TRAINC_CACHE"):
        return Path(folder) / "launch.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainc/launch.json"


def tuned(device: torch.device) -> dict[str, Tile]:
    """The tuned tiles of a CUDA device by key; none for any other device."""
    return _tuned(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


@lru_cache(maxsize=16)
def _tuned(device: str) -> dict[str, Tile]:
    try:
        entries = read_cache().get(device, {})
        return {name: Tile(**entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        # A damaged cache costs speed, not results.
        warnings.warn(f"{cache_file()} is damaged and is ignored: {error}", stacklevel=2)
        return {}


def read_cache() -> dict[str, Any]:
    """The whole cache: tiles by key by device name; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads(cache_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{cache_file()} is damaged: remove it, and run `trainc tune` again"
        ) from error
    return found


def store(device: str, tiles: dict[str, Tile]) -> Path:
    """Add the tiles of a device to the cache; other devices' stay."""
    path = cache_file()
    found = read_cache()
    found[device] = {**found.get(device, {}), **{name: asdict(t) for name, t in tiles.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(found, indent=1) + "\n")
    _tuned.cache_clear()
    return path
