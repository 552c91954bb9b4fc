"""The folder of a run: which files it has, one run at a time writes to it, and no file is overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, Self

from trainc.kernels.library.atomic import UNFINISHED, write_text
from trainc.runtime.storage.checkpoint import remove_unfinished
from trainc.runtime.storage.foreign_files import UnreadableFile, open_file, require_plain
from trainc.runtime.storage.jsonl import JsonlWriter, damaged_records, encode, read_jsonl

FILES = ("metrics.jsonl", "timing.jsonl", "events.jsonl", "summary.json", "checkpoints")


class RunExists(ValueError):
    """A folder already holds a run, or another process writes to it."""


class NoCheckpoint(ValueError):
    """A run is to be resumed and has no checkpoint; the message names the folder."""


class RunFolderLost(OSError):
    """The folder of a run is no longer there, so nothing of the run can be kept."""


class RunFolder:
    """A run's folder, locked while entered.

    `metrics.jsonl`, `timing.jsonl`, `events.jsonl`: one JSON object a line; `checkpoints/`;
    `summary.json` once the run has ended; and the texts it was started with, such as the spec.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Describe a folder; `resume` continues the run in it, `overwrite` moves that run aside.

        A run without a checkpoint and without a summary was killed before its first save. It cannot be continued, so
        without either it is moved aside as well.
        """
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self.summary = path / "summary.json"
        self.entered: list[tuple[str, str]] = []
        """Event and text of what had to be done to enter."""
        self._lock: IO[str] | None = None
        self._events: JsonlWriter | None = None
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self._check_checkpoint()
        with ExitStack() as opened:
            self.path.mkdir(parents=True, exist_ok=True)
            require_plain(self.path / ".lock")
            self._lock = opened.enter_context((self.path / ".lock").open("w"))
            self._take_lock()
            self._finish_earlier()
            self._check_checkpoint()
            if self.holds_run and not self.resume:
                self._make_room()
            self._events = JsonlWriter(self.path / "events.jsonl", math.inf, interval=0.0)
            opened.callback(self._close_events)
            self.entered += damaged_records(self._events.copy)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def _check_checkpoint(self) -> None:
        """Raise NoCheckpoint where the run is to be resumed and nothing was saved."""
        if not self.resume or self.has_checkpoint:
            return
        unsaved = f"{self.path} has no checkpoint to resume from"
        if not self.holds_run:
            raise NoCheckpoint(f"{unsaved}: leave out `--resume` to start a run")
        again = "Leave out `--resume` to start the run again"
        if self.has_summary:
            again = "Write `--overwrite` in place of `--resume` to start again"
        raise NoCheckpoint(
            f"{unsaved}, because the run in it ended before its first save. {again}: what is there is moved aside"
        )

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise RunExists(
                f"{self.path} is in use by another process: wait until it ends, or choose another folder"
            ) from problem
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / ".lock")) from error

    def _finish_earlier(self) -> None:
        """Finish or remove what a process that was killed here had begun."""
        for moving in self.path.glob(".previous-*.moving"):
            self._move_into(moving)
        for unfinished in self.path.glob(UNFINISHED):
            unfinished.unlink()
        remove_unfinished(self.checkpoints)

    def _make_room(self) -> None:
        """Move the run that the folder holds aside; raises RunExists where it could be resumed or has ended."""
        lost = not self.has_checkpoint and not self.has_summary
        if not self.overwrite and not lost:
            raise RunExists(
                f"{self.path} already holds a run: resume or overwrite the run, or choose another folder"
            )
        aside = _first_unused(self.path / f"previous-{number}" for number in count(1))
        moving = self.path / f".{aside.name}.moving"
        moving.mkdir()
        self._move_into(moving)
        if not self.overwrite:
            text = (
                f"the run in the folder had ended before its first save, so this one starts from the beginning;"
                f" {aside} has what was there"
            )
            self.entered.append(("started-again", text))

    def _move_into(self, moving: Path) -> None:
        """Move all files into `.previous-N.moving/`, which is renamed when it has them, as a kill may come between."""
        for entry in [*self.path.iterdir()]:
            if entry.name not in (".lock", moving.name) and not entry.name.startswith("previous-"):
                entry.rename(moving / entry.name)
        moving.rename(self.path / moving.name.removeprefix(".").removesuffix(".moving"))

    def _close_events(self) -> None:
        assert self._events is not None
        with suppress(OSError):  # the error that ended the run says more, such as a full disk
            self._events.close()

    def check_present(self) -> None:
        """Raise RunFolderLost where the folder was removed, moved or replaced since it was entered."""
        if self._lock is None or self._lock.closed:
            return
        try:
            here = (self.path / ".lock").stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            here = None
        if here != os.fstat(self._lock.fileno()).st_ino:
            raise RunFolderLost(
                errno.ENOENT,
                "the folder of the run was removed or moved, so the run was stopped: what was measured since its last"
                " checkpoint is lost",
                str(self.path),
            )

    @property
    def holds_run(self) -> bool:
        """Say whether there is a run in the folder."""
        return any((self.path / name).exists() for name in FILES)

    @property
    def has_checkpoint(self) -> bool:
        """Say whether a checkpoint was saved, intact or not."""
        return any(self.checkpoints.glob("step-*"))

    @property
    def has_summary(self) -> bool:
        """Say whether the run in the folder, or a part of it, came to an end."""
        return self.summary.exists()

    def write_event(self, event: str, step: int, **details: Any) -> None:
        """Append an event to `events.jsonl`, with the time of day."""
        assert self._events is not None, "events can be written only inside `with folder:`"
        self._events.write({"time": round(time.time(), 3), "step": step, "event": event, **details})

    def decided(self) -> dict[int, dict[str, int]]:
        """Return what steps decided by times, by their numbers, as `events.jsonl` has it: what was written last counts.

        An event that begins the run `anew`, under another spec, ends what was decided for the steps after it.
        """
        found: dict[int, dict[str, int]] = {}
        for record in read_jsonl(self.path / "events.jsonl"):
            numbers, step = record.get("numbers"), record.get("step")
            if record.get("event") != "decided" or not isinstance(step, int):
                continue
            if record.get("anew"):
                found = {number: one for number, one in found.items() if number <= step}
            if isinstance(numbers, dict) and all(
                type(n) is int and n > 0 for n in numbers.values()
            ):
                found[step] = numbers
        return found

    def sync_events(self) -> None:
        """Force all events to the disk."""
        assert self._events is not None, "events can be written only inside `with folder:`"
        self._events.sync()

    def keep_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write the texts that a run is started with; keep an older text that differs as NAME.until-STEP."""
        for name, text in texts.items():
            path = self.path / name
            if path.parent != self.path or name in FILES:
                raise ValueError(
                    f"`{name}` cannot be a text in the folder of a run: expected a file name"
                    f" without folders, other than {', '.join(FILES)}"
                )
            if os.path.lexists(path):
                if _holds(path, text.encode()):
                    continue
                marks = ("" if number == 1 else f"-{number}" for number in count(1))
                path.rename(_first_unused(self.path / f"{name}.until-{step}{m}" for m in marks))
            write_text(path, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_text(self.summary, json.dumps(encode(summary), indent=1) + "\n")


class FollowedFolder(RunFolder):
    """The folder of a run as its processes other than rank 0 have it: they read, and write nothing."""

    def __enter__(self) -> Self:
        return self

    def write_event(self, event: str, step: int, **details: Any) -> None:
        """Do nothing: rank 0 writes."""

    def sync_events(self) -> None:
        """Do nothing."""

    def keep_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Do nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


def _holds(path: Path, text: bytes) -> bool:
    """Return whether a path is a plain file with this text."""
    try:
        with open_file(path) as file:
            return file.read(len(text) + 1) == text
    except UnreadableFile:
        return False


def _first_unused(paths: Iterable[Path]) -> Path:
    """Return the first path that does not exist."""
    return next(path for path in paths if not os.path.lexists(path))
