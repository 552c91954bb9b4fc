"""File operations below a folder, numbered as they happen, so that one of them can fail or be the last.

Opening for writing, writing, forcing to the disk, renaming and removing pass through here, and a fault decides before
each what becomes of it. Nothing is forced to the disk in truth: what a process wrote before it was killed is there.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from trainc.runtime.storage import checkpoint

Real = Callable[..., Any]
Part = Literal["whole", "half"]


class Killed(BaseException):
    """The process ends here: what follows leaves no trace, as after SIGKILL."""


class Half(Exception):
    """Of a write, only the first half happens."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: its number from 0, what it does, and the file or folder, below the root."""

    number: int
    name: str
    path: str


def die() -> None:
    """End a process that is only imagined."""
    raise Killed


@dataclass(eq=False)
class Fault:
    """What goes wrong at the first operation of these names from number `at` on; `after` with those that follow."""

    at: int = 1 << 60
    names: frozenset[str] = frozenset({"open", "write", "fsync", "rename", "remove", "mkdir"})
    error: int | None = None
    half: bool = False
    after: frozenset[str] = frozenset()
    once: Callable[[Path], None] | None = None
    kills: bool = False
    end: Callable[[], None] = die
    hit: Operation | None = None

    def meet(self, operation: Operation, root: Path) -> None:
        """Decide what becomes of an operation: raise, or let it happen."""
        if self.hit is not None:
            if self.kills:
                self.end()
            if operation.name in self.after:
                self._fail(operation, root)
        elif operation.number >= self.at and operation.name in self.names:
            self.hit = operation
            if self.half:
                raise Half
            if self.kills:
                self.end()
            if self.once is not None:
                self.once(root)
            if self.error is not None:
                self._fail(operation, root)

    def _fail(self, operation: Operation, root: Path) -> None:
        assert self.error is not None
        # Of a handle the system does not say which file it is.
        named = () if operation.name in ("write", "fsync") else (str(root / operation.path),)
        raise OSError(self.error, os.strerror(self.error), *named)


def turn_back(_: Path) -> None:
    """Set the time of day back by a day."""
    now = time.time
    time.time = lambda: now() - 86_400


def move(root: Path) -> None:
    """Move a folder away."""
    root.rename(root.with_name(f"{root.name}.moved"))


SPACE = frozenset({"open", "write", "mkdir"})
FAULTS: dict[str, Callable[[int], Fault]] = {
    "killed": lambda at: Fault(at, kills=True),
    "killed in a write": lambda at: Fault(at, frozenset({"write"}), half=True, kills=True),
    "disk full": lambda at: Fault(at, SPACE, errno.ENOSPC, after=SPACE),
    "disk full in a write": lambda at: Fault(
        at, frozenset({"write"}), errno.ENOSPC, half=True, after=SPACE
    ),
    "error of a write": lambda at: Fault(at, frozenset({"write"}), errno.EIO),
    "error of fsync": lambda at: Fault(at, frozenset({"fsync"}), errno.EIO),
    "error of a rename": lambda at: Fault(at, frozenset({"rename"}), errno.EIO),
    "error of a removal": lambda at: Fault(at, frozenset({"remove"}), errno.EIO),
    "folder read-only": lambda at: Fault(at, error=errno.EROFS, after=Fault.names),
    "folder removed": lambda at: Fault(at, once=shutil.rmtree),
    "folder moved": lambda at: Fault(at, once=move),
    "clock set back": lambda at: Fault(at, once=turn_back),
}


@dataclass(eq=False)
class FileOperations:
    """The operations below a folder, while installed."""

    root: Path
    fault: Fault = field(default_factory=Fault)
    seen: list[Operation] = field(default_factory=list)
    dead: bool = False
    _deciding: bool = False

    def ask(self, name: str, path: Any) -> Part | None:
        """Number an operation below the root, and return what part of it is to happen; None for any other."""
        at = Path(path).absolute()
        if self._deciding or not at.is_relative_to(self.root):
            return None
        if self.dead:
            raise Killed
        operation = Operation(len(self.seen), name, at.relative_to(self.root).as_posix())
        self.seen.append(operation)
        self._deciding = True
        try:
            self.fault.meet(operation, self.root)
        except Half:
            return "half"
        except Killed:
            self.dead = True
            raise
        finally:
            self._deciding = False
        return "whole"

    @contextmanager
    def installed(self) -> Iterator[FileOperations]:
        """Let the operations of this process pass through here inside a block."""
        before = {place: getattr(*place) for place in _PLACES}
        for place, real in before.items():
            setattr(*place, _PLACES[place](self, real))
        try:
            yield self
        finally:
            for place, real in before.items():
                setattr(*place, real)


class _Writer(io.FileIO):
    """A file whose writes are operations."""

    def __init__(self, operations: FileOperations, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._operations, self._path = operations, path

    def write(self, data: Any) -> int:
        """Write all, half, or nothing."""
        if self._operations.dead:
            return len(data)  # what a process that is gone had in its buffers
        half = self._operations.ask("write", self._path) == "half"
        return super().write(bytes(data)[: (len(data) + 1) // 2] if half else data)


def _opening(operations: FileOperations, real: Real) -> Real:
    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        *text: Any,
        closefd: bool = True,
        **named: Any,
    ) -> Any:
        ours = not isinstance(file, int) and mode.strip("b") in ("w", "a")
        if not ours or operations.ask("open", file) is None:
            return real(file, mode, buffering, *text, closefd=closefd, **named)
        buffered = io.BufferedWriter(_Writer(operations, file, mode.strip("b")))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **named)

    return opened


def _named(name: str) -> Callable[[FileOperations, Real], Real]:
    def wrap(operations: FileOperations, real: Real) -> Real:
        def call(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            within = {} if dir_fd is None else {"dir_fd": dir_fd}
            operations.ask(name, path if dir_fd is None else _path_of(dir_fd) / path)
            return real(path, *rest, **within, **named)

        return call

    return wrap


def _syncing(operations: FileOperations, real: Real) -> Real:
    def sync(handle: int) -> None:
        if operations.ask("fsync", _path_of(handle)) is None:
            real(handle)

    return sync


def _saving(operations: FileOperations, real: Real) -> Real:
    """Write tensors, which safetensors does on its own: it is asked twice, so that the second half can fail."""

    def save(tensors: Any, path: Path) -> None:
        try:
            half = operations.ask("write", path) == "half"
            real(tensors, path)
            if half:
                os.truncate(path, path.stat().st_size // 2)
                operations.ask("write", path)
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None

    return save


def _path_of(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


_PLACES: dict[tuple[Any, str], Callable[[FileOperations, Real], Real]] = {
    (builtins, "open"): _opening,
    (io, "open"): _opening,
    (os, "fsync"): _syncing,
    (checkpoint, "save_file"): _saving,
    (os, "rename"): _named("rename"),
    (os, "replace"): _named("rename"),
    (os, "unlink"): _named("remove"),
    (os, "remove"): _named("remove"),
    (os, "rmdir"): _named("remove"),
    (os, "mkdir"): _named("mkdir"),
    (time, "time"): lambda _, real: real,
}
