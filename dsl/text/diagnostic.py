"""Diagnostics: what went wrong, where, and what to write instead."""

from __future__ import annotations

from typing import Literal

from trainc.dsl.text.language_rules import RuleExplanation
from trainc.dsl.text.record import Record
from trainc.dsl.text.rules import RULES
from trainc.dsl.text.source import Span

Severity = Literal["error", "warning"]


class Label(Record):
    """A span and a text about it; the first label of a diagnostic is at the mistake."""

    span: Span
    text: str = ""


def repetition(again: Span, first: Span) -> tuple[Label, Label]:
    """Return the labels for something that is given twice."""
    return Label(again, "the second is here"), Label(first, "the first is here")


class Edit(Record):
    """A replacement that would correct the text."""

    span: Span
    text: str


class Diagnostic(Record):
    """One mistake or warning; dsl/text/render.py turns it into text."""

    rule: str
    message: str
    labels: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: str | None = None
    severity: Severity = "error"
    edit: Edit | None = None
    explanation: RuleExplanation | None = None
    """What the rule means, given where a construct declares the rule."""

    def __post_init__(self) -> None:
        assert self.explanation is not None or self.rule in RULES, (
            f"there is no rule `{self.rule}`: add it to the rules in dsl/text, or to `rules` of a construct"
        )
        self._set("explanation", self.explanation or RULES[self.rule])

    @property
    def span(self) -> Span | None:
        """Return where the mistake is; None for a spec that was made in Python."""
        return self.labels[0].span if self.labels else None


class Diagnostics(list[Diagnostic]):
    """The diagnostics that a part of a check has found so far."""

    def report(
        self,
        rule: str,
        message: str,
        *labels: Label,
        notes: tuple[str, ...] = (),
        help: str | None = None,
        severity: Severity = "error",
        edit: Edit | None = None,
    ) -> None:
        """Add a diagnostic; its first label is at the mistake."""
        self.append(Diagnostic(rule, message, labels, notes, help, severity, edit))
