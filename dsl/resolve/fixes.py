"""Make the safe edits of a spec's diagnostics in its file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from trainc.dsl.reading.construct import Catalog
from trainc.dsl.resolve.includes import read_source
from trainc.dsl.resolve.resolver import Checked, Resolver
from trainc.dsl.text.diagnostic import Diagnostic, Edit
from trainc.dsl.text.source import Source

ROUNDS = 20
"""Checks of one file: a statement that can be read again may show the next mistake."""


def fix_file(path: Path, catalog: Catalog, settings: Sequence[str] = ()) -> list[Edit]:
    """Make the safe edits of a file until there are none, and return them; other files stay as they are.

    An edit is left out where it leads to more errors than there were: it may not be what was meant.
    """
    source, unreadable = read_source(path)
    if unreadable:
        return []
    check = partial(_check, path, catalog, settings)
    found = check(source)
    most, made, best, kept = len(found.errors), list[Edit](), source.text, 0
    for _ in range(ROUNDS):
        edits = _helpful(found, source, check)
        if not edits:
            break
        made += edits
        source = Source(source.name, fixed_text(source.text, edits))
        found = check(source)
        if len(found.errors) <= most:
            best, kept = source.text, len(made)
    if kept:
        _write(path, best)
    return made[:kept]


def _check(path: Path, catalog: Catalog, settings: Sequence[str], source: Source) -> Checked:
    return Resolver(source, path, catalog, settings).checked()


def _helpful(found: Checked, source: Source, check: Callable[[Source], Checked]) -> list[Edit]:
    """Return safe edits that leave no more errors to correct by hand than there are: all, or the first that does."""
    edits = safe_edits(found.diagnostics, source)
    for some in (edits, *([edit] for edit in edits)):
        after = check(Source(source.name, fixed_text(source.text, some)))
        by_hand = sum(d.edit is None or not d.edit.safe for d in after.errors)
        if by_hand <= len(found.errors):
            return some
    return []


def safe_edits(found: Iterable[Diagnostic], source: Source) -> list[Edit]:
    """Return the safe edits of a source, in its order and without those that overlap an earlier one."""
    edits = {d.edit for d in found if d.edit is not None and d.edit.safe}
    out: list[Edit] = []
    for edit in sorted(edits, key=lambda e: (e.span.start, e.span.end)):
        same = edit.span.source == source
        if same and (not out or edit.span.start >= out[-1].span.end):
            out.append(edit)
    return out


def fixed_text(text: str, edits: Sequence[Edit]) -> str:
    """Return a text with edits made that do not overlap."""
    for edit in sorted(edits, key=lambda e: e.span.start, reverse=True):
        text = text[: edit.span.start] + edit.text + text[edit.span.end :]
    return text


def _write(path: Path, text: str) -> None:
    """Replace a file at once, with its line ends and mode as they were."""
    target = path.resolve()
    before = target.read_bytes()
    mark = "\ufeff" if before.startswith(b"\xef\xbb\xbf") else ""
    ends = "\r\n" if b"\r\n" in before else "\n"
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write((mark + text.replace("\n", ends)).encode())
        Path(name).chmod(target.stat().st_mode)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
