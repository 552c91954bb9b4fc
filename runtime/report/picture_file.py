"""The formats of pictures, by the ends of their files' names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = ("png", "pdf", "svg")


def picture_format(output: Path) -> str:
    """Return the format of a picture by the end of its file's name; PNG where that has none.

    Raises ValueError for an end that is not of FORMATS.
    """
    end = output.suffix[1:].lower()
    if end and end not in FORMATS:
        raise ValueError(
            f"a picture is written as PNG, PDF or SVG, and not as `{end}`: end its name in .png, .pdf or .svg"
        )
    return end or "png"
