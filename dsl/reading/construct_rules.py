"""The rules that constructs bring, beside those of the language and the compiler."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.text.language_rules import RuleExplanation
from trainc.dsl.text.rules import RULES


def explanation(construct: Construct, rule: str) -> RuleExplanation | None:
    """Return what a rule means in a problem of a construct; None for a rule that it may not name."""
    return construct.rules.get(rule, RULES.get(rule))


def rules_of(catalog: Catalog) -> dict[str, RuleExplanation]:
    """Return every rule that a diagnostic can name, by name; all constructs of the catalog are loaded."""
    found = dict(RULES)
    for construct in catalog.values():
        found |= construct.rules
    return dict(sorted(found.items()))


def check_rules(new: type[Construct], others: Iterable[type[Construct]]) -> None:
    """Raise ValueError when another construct gives a rule of a new one another meaning."""
    for other in others:
        for rule in new.rules.keys() & other.rules.keys():
            if new.rules[rule] != other.rules[rule]:
                raise ValueError(
                    f"`{other.heading()}` and `{new.heading()}` explain the rule `{rule}` differently, in"
                    f" `{other.__module__}` and `{new.__module__}`: give one of the two rules another name"
                )
