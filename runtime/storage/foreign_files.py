"""Files that somebody else may have written or damaged: what is read from them is data, and a wrong one is named."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from trainc.kernels.library.atomic import naming, write_text

MANIFEST = "manifest.json"
LARGEST_JSON = 1 << 28
"""Bytes of a JSON file; none that trainc writes is near it."""


class UnreadableFile(ValueError):
    """A file cannot be used; the message names it and says why."""


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading; raises UnreadableFile, without waiting, for what is not a plain file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnreadableFile(f"{path} is missing") from None
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableFile(f"{path} is not a plain file")
    return open(handle, "rb")  # noqa: PTH123 - a handle, not a path


def require_plain(path: Path) -> None:
    """Raise UnreadableFile, without waiting, where there is something that is not a plain file, as one to write to."""
    if os.path.lexists(path):
        open_file(path).close()


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Return the object in a JSON file; raises UnreadableFile for anything else that a file may hold."""
    with naming(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise UnreadableFile(f"{path} has {size} bytes: expected JSON of at most {largest}")
        data = file.read()
    with interpreting(path):
        found = json.loads(data)
    if not isinstance(found, dict):
        raise UnreadableFile(f"{path} holds a JSON {type(found).__name__}: expected an object")
    return found


@contextmanager
def interpreting(path: Path) -> Iterator[None]:
    """Turn what an unexpected content makes the block raise into an UnreadableFile that names the file."""
    try:
        yield
    except (UnreadableFile, OSError):
        raise
    except RecursionError as error:
        raise UnreadableFile(f"{path} is damaged: it is nested too deeply") from error
    except KeyError as error:
        raise UnreadableFile(f"{path} is damaged: it has no {error}") from error
    except Exception as error:
        raise UnreadableFile(f"{path} is damaged: {error}") from error


def checksum(path: Path) -> dict[str, Any]:
    """Return the SHA-256 and the bytes of a file; raises UnreadableFile."""
    with naming(path), open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "bytes": os.fstat(file.fileno()).st_size}


def write_manifest(
    folder: Path,
    names: Iterable[str],
    facts: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write `manifest.json`: facts, and the checksums of the folder's files, of which some may be known.

    It is written last.
    """
    files = {**(known or {}), **{name: checksum(folder / name) for name in names}}
    write_text(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1) + "\n")


def check_manifest(
    folder: Path, required: Sequence[str], version: int, instead: str
) -> dict[str, Any]:
    """Return the manifest of a folder after every file in it was checked; `instead` is the advice for old formats.

    Raises UnreadableFile where the manifest has another `format`, lacks a required file, or a file is not as it says.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != version:
        raise UnreadableFile(
            f"{path} has format {manifest.get('format')!r}, but this version of trainc reads {version}:"
            f" {instead}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not set(required) <= files.keys():
        raise UnreadableFile(f"{path} is damaged: it does not list {', '.join(required)}")
    for name, expected in files.items():
        if Path(name).name != name:
            raise UnreadableFile(f"{path} is damaged: {name!r} is not a file of the folder")
        if checksum(folder / name) != expected:
            raise UnreadableFile(
                f"{folder / name} is damaged: its checksum differs from that in the manifest"
            )
    return manifest
