"""Diagnostics: what went wrong, where, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from trainc.dsl.text.record import Record
from trainc.dsl.text.rules import RULES
from trainc.dsl.text.source import Span

Severity = Literal["error", "warning"]


class Label(Record):
    """A span and what it is; the first label of a diagnostic is where the mistake is."""

    span: Span
    text: str = ""


class Edit(Record):
    """A replacement that would mend the text."""

    span: Span
    text: str


class Diagnostic(Record):
    """One mistake, as data; rendering is separate."""

    rule: str
    message: str
    labels: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: str | None = None
    severity: Severity = "error"
    edit: Edit | None = None

    def __post_init__(self) -> None:
        assert self.rule in RULES, f"`{self.rule}` is not a rule of dsl/text/rules.py"

    @property
    def span(self) -> Span | None:
        """Return where the mistake is, or None for a spec that was not written as text."""
        return self.labels[0].span if self.labels else None


class SpecError(Exception):
    """Every problem found in one phase, raised once at its end."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        from trainc.dsl.text.render import render_text

        return "\n" + render_text(self.diagnostics)


class CompilerBug(Exception):
    """A mistake of ours; please report it with the text of the message."""

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"{where}: {detail} (this is a bug in trainc, please report it)")


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that `name` was most likely meant to be, or None."""
    from difflib import get_close_matches

    if len(name) > 64:  # difflib is quadratic, and nobody mistypes that much
        return None
    known = {option.lower(): option for option in options}
    match = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return known[match[0]] if match else None


def suggest(name: str, options: Iterable[str]) -> str | None:
    """Return a help line that proposes the nearest option, or None."""
    near = nearest(name, options)
    return f"did you mean `{near}`?" if near else None
