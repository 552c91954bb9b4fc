"""JSON lines: the measurements of a run, one object a line, in the order of the steps.

`metrics.jsonl` holds only what is a function of the run, so it is the same byte for byte after a
resume; times go to `timing.jsonl`. Numbers are written so that they read back exactly;
JSON has no NaN and no infinity, which are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from trainc.kernels.library.atomic import naming, sync, write_bytes
from trainc.runtime.storage.foreign_files import UnreadableFile, open_file, require_plain

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Record = dict[str, Any]


def encode(value: Any) -> Any:
    """Return a value with NaN and infinities as strings, also inside dicts and lists."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {key: encode(inner) for key, inner in value.items()}
        case list() | tuple():
            return [encode(inner) for inner in value]
    return value


def decode(value: Any) -> Any:
    """Return the value that `encode` was given."""
    match value:
        case str():
            return _NON_FINITE.get(value, value)
        case dict():
            return {key: decode(inner) for key, inner in value.items()}
        case list():
            return [decode(inner) for inner in value]
    return value


class JsonlWriter:
    """Appends records to a file of JSON lines; records written before `sync` survive a kill."""

    def __init__(self, path: Path, last_step: float | None = None, interval: float = 1.0) -> None:
        """Open a file, cut after `last_step` if given; lines are flushed every `interval` seconds.

        `copy` is then the copy of a file that had lines which no run wrote.
        """
        require_plain(path)
        self.copy = None if last_step is None or not path.exists() else truncate(path, last_step)
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._interval = interval
        self._flushed = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; raises OSError that names the file."""
        with naming(self._path):
            self._file.write(json.dumps(encode(record), allow_nan=False) + "\n")
            now = time.monotonic()
            if now - self._flushed >= self._interval:
                self._file.flush()
                self._flushed = now

    def sync(self) -> None:
        """Force all records to the disk; raises OSError that names the file."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force all records to the disk and close the file, also where that fails; raises OSError."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            with naming(self._path):
                self._file.close()


def truncate(path: Path, last_step: float) -> Path | None:
    """Leave the records up to `last_step` in a file, for a run that continues there.

    Records of later steps and an incomplete last line are those that the run writes again. Where there is anything
    else, the whole file is first copied to the path that is returned; else None.
    """
    kept: list[bytes] = []
    known, later, end, at = True, False, 0, 0
    with naming(path), open_file(path) as file:
        for line in file:
            at += len(line)
            record = _parse(line)
            step = None if record is None else record.get("step", 0)
            if isinstance(step, bool) or not isinstance(step, int | float):
                known = known and not line.endswith(b"\n")
            elif later or step > last_step:
                later = True
            elif kept or end != at - len(line):
                kept.append(line)
            else:
                end = at
    copy = None if known else _copy(path)
    if kept:
        with path.open("rb") as file:
            write_bytes(path, file.read(end) + b"".join(kept))
    else:
        os.truncate(path, end)
    return copy


def _copy(path: Path) -> Path:
    """Copy a file to `NAME.damaged-N` beside it and return that path."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    copy = next(name for name in names if not name.exists())
    unfinished = path.with_name(f".{copy.name}.writing")
    with naming(copy):
        shutil.copyfile(path, unfinished)
        sync(unfinished)
        unfinished.replace(copy)
    return copy


def damaged_records(*copies: Path | None) -> Iterator[tuple[str, str]]:
    """Yield event and text for each copy that was made of a file."""
    for copy in copies:
        if copy is not None:
            name = copy.name.partition(".damaged")[0]
            text = f"{name} had lines that no run wrote: they were left out, and {copy} has them"
            yield "damaged-records", text


def read_jsonl(path: Path) -> list[Record]:
    """Return the records of a file, without an incomplete last line; raises UnreadableFile for a damaged line."""
    records: list[Record] = []
    with naming(path), open_file(path) as file:
        for number, line in enumerate(file, 1):
            record = _parse(line)
            if record is not None:
                records.append(record)
            elif line.endswith(b"\n"):
                raise UnreadableFile(
                    f"{path}, line {number}: expected a JSON object; the file is damaged"
                )
    return records


def _parse(line: bytes) -> Record | None:
    """Return the record of a complete line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = decode(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
