"""How much memory there is for this process, and how much it has used: on its device, in its container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_NO_LIMIT = 2**63 - 2**20
"""Limits at or above this are none: version 1 of control groups writes them so."""


@dataclass(frozen=True, slots=True)
class Usable:
    """The memory that this process can have in all, in bytes, and what limits it."""

    bytes: int
    limit: str


def usable_memory(device: torch.device, root: Path = Path("/")) -> Usable | None:
    """Return what this process can use on a device, with what it uses already; None where nothing is known.

    `root` is the folder of the system's own files.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Usable(free + torch.cuda.memory_reserved(device), "free memory of the GPU")
    if device.type == "mps":
        return Usable(torch.mps.recommended_max_memory(), "recommended memory of MPS")
    return min(_on_host(root), key=lambda one: one.bytes, default=None)


def used_memory(device: torch.device) -> int:
    """Return the bytes that this process uses on a device now; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _status().get("VmRSS", 0)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used on a device; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _status().get("VmHWM", 0)


def _on_host(root: Path) -> Iterator[Usable]:
    """Yield the limits of the machine, of the container, and of the process."""
    known, own = _numbers(root / "proc/meminfo"), _status()
    held = own.get("VmRSS", 0)
    if "MemAvailable" in known:
        free = known["MemAvailable"] + known.get("SwapFree", 0)
        yield Usable(free + held, "free memory of the machine")
    else:
        with suppress(ValueError, OSError, AttributeError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            yield Usable(total, "memory of the machine")
    for limit, used in _control_groups(root):
        yield Usable(max(limit - used, 0) + held, "limit of the container (its control group)")
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            unused = own.get("VmSize", held) - held  # address space without memory counts, too
            yield Usable(max(limit - unused, 0), "limit of the process (`ulimit -v`)")


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of the control groups of this process and of those around them.

    Pages of files count as used there, and are given up when memory is needed: those that rest are taken off.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            first = controllers == ""
            if not first and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if first else "memory")
            names = ("memory.max", "memory.current", "inactive_file")
            if not first:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            inside = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(inside), -1, -1):
                place = top.joinpath(*inside[:depth])
                limit, used = _number(place / names[0]), _number(place / names[1])
                if limit is not None and limit < _NO_LIMIT:
                    resting = _numbers(place / "memory.stat", 1).get(names[2], 0)
                    yield limit, max((used or 0) - resting, 0)


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none, as for `max`."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _status() -> dict[str, int]:
    return _numbers(Path("/proc/self/status"))


def _numbers(path: Path, unit: int = 1024) -> dict[str, int]:
    """Return the numbers of a file of lines such as `MemFree: 12 kB`, in bytes; none where there is no such file."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, *rest = line.replace(":", " ").split()
            if rest and rest[0].isdigit():
                found[name] = int(rest[0]) * unit
    return found
