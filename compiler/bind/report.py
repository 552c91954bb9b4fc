"""Collect the mistakes found while binding, each placed on its clause."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from trainc.compiler.errors import name_root_module
from trainc.compiler.model.inventory import ParameterEntry
from trainc.dsl.reading.construct import Problem
from trainc.dsl.reading.construct_rules import explanation
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.language_rules import RuleExplanation
from trainc.dsl.text.source import Span


class Report:
    """Collects diagnostics, so that all mistakes of a spec are reported together."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []

    def add(
        self,
        rule: str,
        message: str,
        clause: Clause,
        *,
        part: str = "",
        span: Span | None = None,
        label: str = "",
        notes: Iterable[str] = (),
        help: str | None = None,
        severity: Literal["error", "warning"] = "error",
        explanation: RuleExplanation | None = None,
    ) -> None:
        """Add a diagnostic at `span`, or else at a part of the clause: `on`, a field, or all of it."""
        at = labels((span or clause.part_span(part), label))
        self.diagnostics.append(
            Diagnostic(rule, message, at, tuple(notes), help, severity, explanation=explanation)
        )

    def add_problem(self, problem: Problem, clause: Clause) -> None:
        """Add a mistake that a construct found; without a field it is about what `on` selects.

        Raises TypeError for a rule that the construct does not declare.
        """
        meaning = explanation(clause.construct, problem.rule)
        if meaning is None:
            construct = type(clause.construct)
            raise TypeError(
                f"`{construct.heading()}` reports the rule `{problem.rule}`, which is not a rule of the language:"
                f" explain it in `rules` of `{construct.__name__}` in `{construct.__module__}`"
            )
        self.add(
            problem.rule,
            name_root_module(problem.message),
            clause,
            part="on" if problem.field is None else problem.field,
            notes=problem.notes,
            help=problem.help,
            severity=problem.severity,
            explanation=meaning,
        )


def shared_note(parameter: ParameterEntry) -> tuple[str, ...]:
    """Return a note with all names of a shared parameter; none where it has a single one."""
    if not parameter.aliases:
        return ()
    names = " and ".join(f"`{name}`" for name in (parameter.name, *parameter.aliases))
    return (f"{names} are one tensor: whatever selects one of these names selects all of them",)


def labels(*places: tuple[Span | None, str]) -> tuple[Label, ...]:
    """Return a label with its text at each place in a file or text; None is a clause made in Python."""
    return tuple(Label(span, text) for span, text in places if span is not None)
