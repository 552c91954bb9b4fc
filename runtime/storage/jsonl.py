"""JSON lines: the measurements of a run, one object a line, in the order of the steps.

`metrics.jsonl` holds only what is a function of the run, so it is the same byte for byte after a
resume; times go to `timing.jsonl`. Numbers are written so that they read back exactly;
JSON has no NaN and no infinity, which are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

    def __init__(self, path: Path, last_step: int | None = None, interval: float = 1.0) -> None:
        """Open a file, cut after `last_step` if given; lines are flushed every `interval` seconds."""
        if last_step is not None and path.exists():
            truncate(path, last_step)
        self._file = path.open("a", encoding="utf-8")
        self._interval = interval
        self._flushed = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(encode(record), allow_nan=False) + "\n")
        now = time.monotonic()
        if now - self._flushed >= self._interval:
            self._file.flush()
            self._flushed = now

    def sync(self) -> None:
        """Force all records to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force all records to the disk and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def truncate(path: Path, last_step: int) -> None:
    """Cut a file before its first line that is of a step after `last_step` or is incomplete."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is None or record.get("step", 0) > last_step:
                break
            end += len(line)
    os.truncate(path, end)


def read_jsonl(path: Path) -> list[Record]:
    """Return the records of a file, without an incomplete last line; raises ValueError for a damaged line."""
    records: list[Record] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _parse(line)
            if record is not None:
                records.append(record)
            elif line.endswith(b"\n"):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object; the file is damaged"
                )
    return records


def _parse(line: bytes) -> Record | None:
    """Return the record of a complete line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = decode(json.loads(line))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
