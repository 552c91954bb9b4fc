"""What a run will take, said before its first step and once that is measured, and refused where it cannot fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from trainc.runtime.memory.needs import Needs, format_bytes
from trainc.runtime.memory.usable import Usable, peak_memory, usable_memory, used_memory
from trainc.runtime.run.live_display import format_duration
from trainc.runtime.schedule.clock import Clock, RunLength


class DoesNotFit(ValueError):
    """A run needs more memory or disk than there is; `of` says of which."""

    def __init__(self, message: str, of: Literal["memory", "disk"]) -> None:
        super().__init__(f"{message}. `--no-preflight` starts the run all the same")
        self.of = of


class Preflight:
    """Compares what a run takes with what there is. Nothing is run for it, so that no number of the run changes."""

    def __init__(
        self,
        needs: Needs,
        length: RunLength,
        device: torch.device,
        folder: Path,
        samples: int,
        *,
        compiled: bool = False,
    ) -> None:
        """Take what the plan tells; `samples` are those of a micro-batch.

        With `compiled` the second step may hold compilation, and the third tells the pace.
        """
        self.needs, self.length, self.device, self.samples = needs, length, device, samples
        self.usable = usable_memory(device)
        self.on_disk, self.free = _size(folder / "checkpoints"), free_disk(folder)
        self._before = used_memory(device)
        self._steps, self._paced = 0, 3 if compiled else 2

    def check(self) -> None:
        """Raise DoesNotFit where the plan alone tells that memory or disk do not suffice."""
        needs, usable = self.needs, self.usable
        if usable is not None and needs.least > usable.bytes:
            raise DoesNotFit(
                f"the run needs {format_bytes(needs.least)} of memory before any activation ({needs.parts()}), and"
                f" there are {_there(usable)}. Train fewer parameters (`freeze` of the optimizer, or an `adapt`"
                " clause), take an optimizer with less state, or remove clauses that keep tensors of their own",
                "memory",
            )
        wanted = needs.disk - self.on_disk
        if wanted > self.free:
            least = needs.checkpoint * min(2, needs.checkpoints)
            instead = "choose a folder on another disk with `--out`"
            if needs.kept > 1 and least - self.on_disk < self.free:
                instead = (
                    f"write `keep = 1` in `run`, which needs {format_bytes(least)}, or {instead}"
                )
            raise DoesNotFit(
                f"the run needs {format_bytes(wanted)} of disk ({needs.files()}), and {format_bytes(self.free)} are"
                f" free: {instead}",
                "disk",
            )

    def lines(self) -> Iterator[str]:
        """Yield what the plan tells of memory and disk, before the first step."""
        there = "" if self.usable is None else f"; there are {_there(self.usable)}"
        yield f"memory: {self.needs.memory_text()}{there}"
        yield f"disk: {self.needs.disk_text()}; {format_bytes(self.free)} are free"
        self._before = used_memory(self.device)

    def measured(self, clock: Clock, seconds: float) -> str | None:
        """Return what the first step and one after it took, and what the run will; None for other steps.

        The first one tells of memory, and its time is mostly longer than that of the next, as graphs are captured in
        it. Raises DoesNotFit where the steps to come need more memory than there is.
        """
        self._steps += 1
        if self._steps not in (1, self._paced):
            return None
        now, end = clock.position(self.length)
        begun = 0.0 if clock.before is None else clock.before.position(self.length)[0]
        left = max(end - begun, 0.0) / (now - begun) if now > begun else 1.0
        time = format_duration(seconds * left)
        if self._steps == self._paced:
            which = "second" if self._paced == 2 else "third"
            return (
                f"the {which} step took {seconds:.3g} s; at this pace the rest of the run takes {time}, without"
                " evaluations and checkpoints"
            )
        return f"the first step took {seconds:.3g} s; the run takes at most {time}{self._peak()}"

    def _peak(self) -> str:
        """Return what the memory of the run will be at its peak, as its first step tells."""
        peak, used = peak_memory(self.device), used_memory(self.device)
        if not peak:
            return ""
        # The passes to come have beside them what the update of this step made.
        most = peak + min(max(used - self._before, 0), self.needs.state)
        if self.usable is not None and most > self.usable.bytes:
            instead = "make the model or its samples smaller"
            if (fewer := self.samples // 2) > 0:
                instead = f"write `micro = {fewer} samples` in `data`, or {instead}"
            raise DoesNotFit(
                f"the first step took {format_bytes(peak)} of memory, the next ones need about {format_bytes(most)},"
                f" and there are {_there(self.usable)}: {instead}",
                "memory",
            )
        limit = "" if self.usable is None else f" of {_there(self.usable)}"
        return f", and about {format_bytes(most)} of memory{limit}"


def free_disk(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _there(usable: Usable) -> str:
    return f"{format_bytes(usable.bytes)} ({usable.limit})"
