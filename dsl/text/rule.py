"""The explanation of a rule, for `trainc explain RULE` and docs/diagnostics.md."""

from __future__ import annotations

from trainc.dsl.text.record import Record


class RuleExplanation(Record):
    """A rule: what happened, why it matters, and what to write instead."""

    what: str
    why: str
    fix: str
