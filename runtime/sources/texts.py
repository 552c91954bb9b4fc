"""Texts as tokens in memory: their bytes, or the ids that a tokenizer gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainc.runtime.sources.windows import InMemory, Tokens

Tokenizer = Callable[[str], Any]


class NoTokens(ValueError):
    """A tokenizer returned something else than the ids of tokens."""


class NoText(ValueError):
    """A file is not text in UTF-8."""


def bytes_of(paths: Sequence[Path]) -> InMemory:
    """Return the bytes of all files in a row, with a 0 after each."""
    whole = b"".join(path.read_bytes() + b"\0" for path in paths)
    return InMemory(np.frombuffer(whole, np.uint8))


def text_of_bytes(ids: Sequence[int]) -> str:
    """Return the text of some bytes; what is no UTF-8 is replaced."""
    return bytes(ids).decode("utf-8", "replace")


def ids_of(paths: Sequence[Path], tokenizer: Tokenizer) -> InMemory:
    """Return the ids that a tokenizer gives for the text of each file, in a row.

    Raises NoTokens for anything but whole numbers, and NoText for a file that is not UTF-8.
    """
    parts = [_ids(path, tokenizer(_text(path))) for path in paths]
    return InMemory(np.concatenate(parts) if parts else np.empty(0, np.int64))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NoText(f"{path} is no text in UTF-8: {error}") from error


def _ids(path: Path, found: Any) -> Tokens:
    try:
        ids = np.asarray(found)
    except (ValueError, TypeError, RuntimeError):
        ids = np.asarray(None)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise NoTokens(
            f"returned a {type(found).__name__} for {path.name}: expected a list of whole numbers, the ids of tokens"
        )
    return ids.astype(np.int64)
