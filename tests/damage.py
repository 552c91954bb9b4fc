"""Ways to damage one file of a folder, drawn at random."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

Harm = Callable[[Path, Path], None]
"""What damages a file of a folder; the second path is another file of it."""
DEEP = b'{"a":' * 50_000
WRITTEN = (
    b"", b"{}", b"[]", b"null", b"0", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"format": 1e999}', DEEP, b"[" * 50_000,
    b'{"files": {}}', b'{"clauses": [1]}', b'{"step": 1}\n', b'{"step": true, "loss": "x"}\n', b"\0" * 64,
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """A file by its number, another one, and what happens to the first."""

    file: int
    other: int
    what: str
    at: float = 0.0
    bit: int = 0
    text: bytes = b""

    def do(self, folder: Path) -> Path:
        """Damage the folder and return the file."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        file, other = files[self.file % len(files)], files[self.other % len(files)]
        data = bytearray(file.read_bytes())
        at = int(self.at * max(0, len(data) - 1))
        if self.what == "swap":
            kept = other.read_bytes()
            other.write_bytes(data)
            file.write_bytes(kept)
            return file
        if self.what == "copy":
            shutil.copyfile(other, file) if other != file else None
            return file
        file.unlink()
        if self.what == "cut":
            file.write_bytes(data[:at])
        elif self.what == "flip":
            if data:
                data[at] ^= 1 << self.bit
            file.write_bytes(data)
        elif self.what == "insert":
            file.write_bytes(data[:at] + self.text + data[at:])
        elif self.what == "write":
            file.write_bytes(self.text)
        elif self.what == "huge":
            file.touch()
            os.truncate(file, 1 << 29)
        elif self.what == "folder":
            file.mkdir()
        elif self.what == "pipe":
            os.mkfifo(file)
        elif self.what == "link":
            file.symlink_to(("/dev/zero", file.name, "nowhere", "/")[self.bit % 4])
        else:
            assert self.what == "remove"
        return file


WHAT = (
    "swap",
    "copy",
    "cut",
    "flip",
    "insert",
    "write",
    "huge",
    "folder",
    "pipe",
    "link",
    "remove",
)


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Draw the damage of one file."""
    what = draw(st.sampled_from(WHAT))
    file, other = draw(st.integers(0, 19)), draw(st.integers(0, 19))
    at = draw(st.floats(0, 1)) if what in ("cut", "flip", "insert") else 0.0
    text = b""
    if what == "write":
        text = draw(st.sampled_from(WRITTEN))
    elif what == "insert":
        text = draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(WRITTEN[1:8])))
    return Damage(file, other, what, at, draw(st.integers(0, 7)), text)
