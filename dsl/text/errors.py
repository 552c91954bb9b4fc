"""Exceptions: the user's mistakes in a spec, and our own mistakes."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.render import render_text


class SpecError(Exception):
    """Every mistake found in one stage, raised together at its end.

    As text it is what `trainc check` prints, so that a traceback alone says what to write instead.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return "\n" + render_text(self.diagnostics)


class CompilerBug(Exception):
    """A mistake in trainc, never in a spec; please report it with the text of the message."""

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"{where}: {detail} (this is a bug in trainc, please report it)")
