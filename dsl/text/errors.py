"""Exceptions: mistakes in a spec, and mistakes in trainc itself."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.render import render_text


class SpecError(Exception):
    """Raised with all mistakes that one stage found.

    Its text is what `trainc check` prints, so that a traceback says what to write instead.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return "\n" + render_text(self.diagnostics)


class CompilerBug(Exception):
    """A mistake in trainc, never in a spec; please report it with its message."""

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"{where}: {detail} (this is a bug in trainc, please report it)")
