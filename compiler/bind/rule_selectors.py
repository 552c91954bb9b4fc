"""The parameters that rules freeze and unfreeze."""

from __future__ import annotations

from collections.abc import Iterator

from trainc.compiler.bind.report import labels
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import expectations, select
from trainc.compiler.model.suggestions import suggestion
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Do
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.source import Span
from trainc.dsl.values.value_json import Selector


def selected_by(action: Do, inventory: Inventory) -> tuple[str, ...]:
    """Return the parameters that train of those that a rule freezes or unfreezes; none for another action."""
    if not isinstance(action.argument, Selector):
        return ()
    names = select(action.argument, inventory, "parameters")
    return tuple(name for name in names if inventory.parameter[name].trainable)


def frozen_by_rules(spec: Spec, inventory: Inventory) -> frozenset[str]:
    """Return the parameters that rules freeze."""
    acts = (action for _, action in _verbs(spec) if action.verb == "freeze")
    return frozenset(name for action in acts for name in selected_by(action, inventory))


def rule_selector_problems(spec: Spec, inventory: Inventory) -> Iterator[Diagnostic]:
    """Yield an error for every selector of a rule that selects nothing which the rule could freeze or unfreeze."""
    for span, action in _verbs(spec):
        if (selector := action.argument) is None or not isinstance(selector, Selector):
            continue
        at = labels((span, ""))
        try:
            matched = select(selector, inventory, "parameters")
            counts = list(expectations(selector, inventory, "parameters"))
        except ValueError as error:
            yield Diagnostic("bad-value", str(error), at)
            continue
        for expect, count in counts:
            if expect.count != count:
                message = f"the selector of `{action.verb}` matches {count} parameters, not {expect.count}"
                yield Diagnostic("selector-count", message, at)
        names = selected_by(action, inventory)
        if not matched:
            message = f"the selector of `{action.verb}` matches nothing in `{inventory.model}`"
            found = labels((span, f"0 of {len(inventory.parameters)} parameters"))
            help = suggestion(selector, inventory, "parameters")
            yield Diagnostic("selector-matches-nothing", message, found, (), help)
        elif not names:
            message = f"all {len(matched)} selected parameters are frozen in the whole run"
            yield Diagnostic("selector-matches-frozen", message, at)
        elif action.verb == "unfreeze" and frozen_by_rules(spec, inventory).isdisjoint(names):
            message = (
                f"no rule freezes what `unfreeze {selector}` selects, so that it has no effect"
            )
            help = f"freeze it by a rule first: `when steps < 1 {{ freeze {selector} }}`"
            yield Diagnostic("no-effect", message, at, (), help)


def _verbs(spec: Spec) -> Iterator[tuple[Span | None, Do]]:
    """Yield the actions of all rules that are no assignments, each with its place."""
    for rule in spec.rules:
        for i, action in enumerate(rule.actions, 1):
            if isinstance(action, Do):
                yield rule.part_span(f"action {i}"), action
