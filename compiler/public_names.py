"""What `dir()` and completion show of an object that users hold: what is public."""

from __future__ import annotations

from typing import ClassVar


class PublicNames:
    """Leaves private names out of `dir()`, and those that only trainc's own files use."""

    internal: ClassVar[frozenset[str]] = frozenset({"internal"})

    def __dir__(self) -> list[str]:
        names = (name for name in super().__dir__() if name not in self.internal)
        return [name for name in names if name.startswith("__") or not name.startswith("_")]
