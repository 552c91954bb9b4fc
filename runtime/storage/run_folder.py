"""The folder of a run: which files it has, one run at a time writes to it, and no file is overwritten."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import IO, Any, Self

from trainc.kernels.library.atomic import write_text
from trainc.runtime.storage.jsonl import JsonlWriter, encode

FILES = ("metrics.jsonl", "timing.jsonl", "events.jsonl", "summary.json", "checkpoints")


class RunExists(ValueError):
    """A folder already holds a run, or another process writes to it."""


class RunFolder:
    """A run's folder, locked while entered.

    `metrics.jsonl`, `timing.jsonl`, `events.jsonl`: one JSON object a line; `checkpoints/`;
    `summary.json` once the run has ended; and the texts it was started with, such as the spec.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Describe a folder; `resume` continues the run in it, `overwrite` moves that run aside."""
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self._lock: IO[str] | None = None
        self._events: JsonlWriter | None = None

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.holds_run and not self.resume:
                if not self.overwrite:
                    raise RunExists(
                        f"{self.path} already holds a run: resume or overwrite the run, or choose another folder"
                    )
                self._move_aside()
        except BlockingIOError as problem:
            self._lock.close()
            raise RunExists(
                f"{self.path} is in use by another process: wait until it ends, or choose another folder"
            ) from problem
        except BaseException:
            self._lock.close()
            raise
        self._events = JsonlWriter(self.path / "events.jsonl", interval=0.0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._events is not None:
            self._events.close()
        if self._lock is not None:
            self._lock.close()

    @property
    def holds_run(self) -> bool:
        """Say whether there is a run in the folder."""
        return any((self.path / name).exists() for name in FILES)

    def write_event(self, event: str, step: int, **details: Any) -> None:
        """Append an event to `events.jsonl`, with the time of day."""
        assert self._events is not None, "events can be written only inside `with folder:`"
        self._events.write({"time": round(time.time(), 3), "step": step, "event": event, **details})

    def keep_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write the texts that a run is started with; keep an older text that differs as NAME.until-STEP."""
        for name, text in texts.items():
            path = self.path / name
            if path.parent != self.path or name in FILES:
                raise ValueError(
                    f"`{name}` cannot be a text in the folder of a run: expected a file name"
                    f" without folders, other than {', '.join(FILES)}"
                )
            if path.exists():
                if path.read_text(encoding="utf-8") == text:
                    continue
                marks = ("" if number == 1 else f"-{number}" for number in count(1))
                path.rename(_first_unused(self.path / f"{name}.until-{step}{m}" for m in marks))
            write_text(path, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_text(self.path / "summary.json", json.dumps(encode(summary), indent=1) + "\n")

    def _move_aside(self) -> None:
        """Move all files into `previous-N/`."""
        aside = _first_unused(self.path / f"previous-{number}" for number in count(1))
        entries = [
            entry
            for entry in self.path.iterdir()
            if entry.name != ".lock" and not entry.name.startswith("previous-")
        ]
        aside.mkdir()
        for entry in entries:
            entry.rename(aside / entry.name)


def _first_unused(paths: Iterable[Path]) -> Path:
    """Return the first path that does not exist."""
    return next(path for path in paths if not path.exists())
