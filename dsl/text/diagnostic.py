"""Diagnostics: what went wrong, where, and what to write instead."""

from __future__ import annotations

import re
from typing import Literal

from trainc.dsl.text.language_rules import RuleExplanation
from trainc.dsl.text.nearest import nearest
from trainc.dsl.text.record import Record
from trainc.dsl.text.rules import RULES
from trainc.dsl.text.source import Span, printable

Severity = Literal["error", "warning"]


class Label(Record):
    """A span and a text about it; the first label of a diagnostic is at the mistake."""

    span: Span
    text: str = ""


def repetition(again: Span, first: Span) -> tuple[Label, Label]:
    """Return the labels for something that is given twice."""
    return Label(again, "the second is here"), Label(first, "the first is here")


class Edit(Record):
    """A replacement that would correct the text; one that is `safe` cannot change what was meant."""

    span: Span
    text: str
    safe: bool = False

    def __str__(self) -> str:
        """Return what is replaced by what."""
        new = printable(self.text, 80)
        old = printable(self.span.text, 80)
        return f"`{old}` is now `{new}`" if old else f"`{new}` added"


_CLOSED = frozenset(
    ("syntax", "unknown-kind", "unknown-field", "unknown-function", "unknown-construct",
     "unknown-action", "bad-value", "wrong-unit")
)  # fmt: skip
"""The rules on words of the language: a misspelt one cannot be anything else."""


def _suggested(rule: str, help: str, span: Span) -> Edit | None:
    """Return the edit that a help line such as "did you mean `epochs`?" proposes for the word of a span."""
    if (call := re.match(r"write a call: `([^`.]+)`", help)) is not None:
        return Edit(span, call[1])
    meant = re.match(r"did you mean `([^`]+)`", help)
    if meant is None or " " in span.text:
        return None
    if nearest(span.text, [meant[1]]) is not None:
        return Edit(span, meant[1], rule in _CLOSED)
    words = [word for word in re.finditer(r"\w+", span.text) if nearest(word[0], [meant[1]])]
    return Edit(span.part(*words[0].span()), meant[1]) if len(words) == 1 else None


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
        if self.edit is None and self.help and self.labels:
            self._set("edit", _suggested(self.rule, self.help, self.labels[0].span))

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
