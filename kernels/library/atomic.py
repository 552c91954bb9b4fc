"""Write a file atomically: neither a reader nor a crash ever leaves half of it."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to a temporary file next to `path`, force it to the disk, and rename it to `path`.

    Raises OSError; `path` is then what it was, and the file beside it is gone.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
