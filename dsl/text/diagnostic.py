"""Diagnostics: what went wrong, where, and what to write instead."""

from __future__ import annotations

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
