"""What a run needs, as far as its plan tells: parts of its memory, and checkpoints on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

RECORDS = 700
"""Bytes that a step takes in the records of a run, about, where it measures little."""


Of = Literal["weights", "trained"]


@dataclass(frozen=True, slots=True)
class Need:
    """Memory for one thing, in bytes; `sure` where the run needs no less.

    `of` says whether it is as large as the weights, or those that train: processes that share these share it.
    """

    what: str
    bytes: int
    sure: bool = True
    of: Of | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """The memory of a run without what its passes need, and its disk.

    `state` are the bytes of the optimizers' state in it, `checkpoint` those of one checkpoint; `kept` is how many of
    these stay, `saves` how many are saved, None where that is not known; `steps` are those of the run, None likewise.
    `processes` share it, and the memory is that of one of them.
    """

    memory: tuple[Need, ...]
    state: int
    checkpoint: int
    kept: int
    saves: float | None = None
    steps: float | None = None
    processes: int = 1

    def of_one(self, parts: Mapping[Of, float], processes: int) -> Needs:
        """Return the needs of one of several processes, which has these parts of the weights and of those that train.

        The disk is that of all.
        """
        memory = tuple(
            one if one.of is None else replace(one, bytes=round(one.bytes * parts[one.of]))
            for one in self.memory
        )
        state = round(self.state * parts["trained"])
        return replace(self, memory=memory, state=state, processes=processes)

    @property
    def least(self) -> int:
        """Return the bytes of memory that the run cannot do without."""
        return sum(need.bytes for need in self.memory if need.sure)

    @property
    def checkpoints(self) -> int:
        """Return how many checkpoints are on the disk at once: those that are kept, and one that is written."""
        most = self.kept + 1
        return most if self.saves is None else min(most, max(1, round(self.saves)))

    @property
    def disk(self) -> int:
        """Return the bytes on the disk, about."""
        return self.checkpoints * self.checkpoint + round((self.steps or 0) * RECORDS)

    def parts(self) -> str:
        """Return the parts of the memory in words."""
        return ", ".join(f"{one.what} {format_bytes(one.bytes)}" for one in self.memory)

    def files(self) -> str:
        """Return in words what is on the disk."""
        one = "the checkpoint has" if self.checkpoints == 1 else "checkpoints have"
        written = ", of which one is written" if self.checkpoints > self.kept else ""
        count = "" if self.checkpoints == 1 else f", up to {self.checkpoints} of them{written}"
        return f"{one} {format_bytes(self.checkpoint)}{count}"

    def memory_text(self) -> str:
        """Return what a run takes of memory, for people."""
        whole, gathered = format_bytes(sum(one.bytes for one in self.memory)), ""
        if self.processes > 1:
            whole += f" in this process, one of {self.processes} that share the weights"
            gathered = ", the weights that a pass gathers,"
        return f"{whole} ({self.parts()}){gathered} and the activations of a pass, which the first step measures"

    def disk_text(self) -> str:
        """Return what a run takes of the disk, for people."""
        records = (
            "" if self.steps is None else f", records about {format_bytes(self.steps * RECORDS)}"
        )
        return f"about {format_bytes(self.disk)} ({self.files()}{records})"


def format_bytes(count: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
