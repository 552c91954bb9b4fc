"""Write a file atomically: neither a reader nor a crash ever leaves half of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".*.writing"
"""What a process that is killed while it writes leaves beside the file."""


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file next to `path`, force it to the disk, and rename it to `path`.

    Raises OSError that names `path`, which is then what it was, and the file beside it is gone.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with naming(path):
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            with suppress(OSError):  # the error before it says more
                beside.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk; raises OSError that names it."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError of the block name `path`: writing and `fsync` name no file, others a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
