"""Rows of the GPU benchmark and the file that holds them: written after every row, and read by the next start."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.device import Cuda
from benchmarks.measure import Json

SOURCES = ("benchmarks", "compiler", "dsl", "kernels", "runtime", "trainc")
Judge = Callable[[Json], list[Json]]
"""What becomes of the predictions by all that is known."""
SAME = ("device", "versions", "sources")
"""What has to be the same for the rows of an earlier start to stand."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to find out: `run(device, until)` starts nothing new when the clock has passed `until`."""

    part: str
    name: str
    seconds: float
    run: Callable[[Cuda, float], Json]

    @property
    def key(self) -> str:
        """Name the row in files and messages."""
        return f"{self.part}: {self.name}"


def digest() -> str:
    """Return what tells one state of the sources from another, with or without git."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str | None:
    """Return the commit of the checkout; None where git does not know."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Record:
    """The results so far; those of an earlier start stand where device, versions and sources are the same."""

    def __init__(self, path: Path | None, about: Json, judge: Judge) -> None:
        self.path, self.judge = path, judge
        self.found: Json = {**about, "conditions": [], "rows": [], "left out": []}
        if path is not None and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in SAME if earlier.get(name) != about[name]]
            if other:
                kept = _set_aside(path)
                print(
                    f"{path} is of other {' and '.join(other)}: it is {kept} now, and every row is measured anew",
                    file=sys.stderr,
                )
            else:
                self.found |= {name: earlier[name] for name in ("conditions", "rows")}

    def outstanding(self, rows: Sequence[Row]) -> list[str]:
        """Return the keys of the rows to run: those never tried, then those without a result."""
        states = {
            row["key"]: "failed" in row or "not measured" in row for row in self.found["rows"]
        }
        failed = [row.key for row in rows if states.get(row.key)]
        return [row.key for row in rows if row.key not in states] + failed

    def standing(self, key: str) -> Json | None:
        """Return what was found of a row, if anything was."""
        return next((row for row in self.found["rows"] if row["key"] == key), None)

    def add(self, row: Json) -> None:
        """Keep a row in place of what stood for it, on disk too."""
        self.found["rows"] = [one for one in self.found["rows"] if one["key"] != row["key"]] + [row]
        self.write()

    def write(self) -> None:
        """Keep what is known."""
        self.found["predictions"] = self.judge(self.found)
        if self.path is not None:
            write(self.path, self.found)


def _set_aside(path: Path) -> Path:
    """Give a file a name of its own and return that: what was measured is not written over."""
    own = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.replace(path.with_name(f"{path.stem}.before-{own}{path.suffix}"))


def write(path: Path, found: Json) -> None:
    """Write a file in one piece."""
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)
