"""What the selectors of a clause match in the model, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainc.compiler.bind.report import Report
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import Target, expectations, select
from trainc.compiler.model.suggestions import suggestion, unknown_classes
from trainc.dsl.reading.construct import Construct
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Scoped, Selector

_TRAINABLE_ONLY = ("optimizer", "lr", "mask")
"""The kinds whose clauses leave frozen parameters out of their selection."""


def check_field_selectors(clause: Clause, inventory: Inventory, report: Report) -> None:
    """Report unknown classes in the selectors in the fields of a clause."""
    if not clause.optional:
        for field, selector in _field_selectors(clause.construct):
            _report_unknown_classes(clause, field, selector, inventory, report)


def select_targets(
    clause: Clause, target: Target, inventory: Inventory, report: Report
) -> tuple[str, ...]:
    """Return the names that `on`, or else the construct's default, matches; mistakes go to `report`."""
    selector = clause.selection
    if selector is None:
        report.add("missing-field", f"`{clause.construct.title}` needs `on SELECTOR`", clause)
        return ()
    for expect, count in expectations(selector, inventory, target):
        if expect.count != count:
            message = f"the selector matches {count} {target}, not {expect.count}"
            report.add("selector-count", message, clause, part="on")
    try:
        names = select(selector, inventory, target)
    except ValueError as error:
        report.add("bad-value", str(error), clause, part="on")
        return ()
    if not names and not clause.optional:
        _report_no_match(clause, selector, target, inventory, report)
    elif not clause.optional:
        _report_unknown_classes(clause, "on", selector, inventory, report)
    if target == "parameters" and clause.construct.kind in _TRAINABLE_ONLY:
        names = _trainable(names, clause, inventory, report)
    return names


def _field_selectors(construct: Construct) -> Iterator[tuple[str, Selector]]:
    """Yield the selectors in a construct's fields, with the field's name."""
    for name in type(construct).model_fields:
        value = getattr(construct, name)
        for item in value if isinstance(value, tuple | list) else (value,):
            part = item.on if isinstance(item, Scoped) else item
            if isinstance(part, Selector):
                yield name, part


def _report_unknown_classes(
    clause: Clause, part: str, selector: Selector, inventory: Inventory, report: Report
) -> None:
    """Report the classes in a selector that do not exist, each at its name if the text contains it."""
    for name, help_ in unknown_classes(selector, inventory).items():
        whole = clause.part_span(part)
        word = re.search(rf"\b{re.escape(name)}\b", whole.text) if whole else None
        report.add(
            "unknown-class",
            f"neither `{inventory.model}` nor torch.nn has a class `{name}`",
            clause,
            span=whole.part(*word.span()) if whole and word else whole,
            help=help_
            or "remove the name, or make the clause `optional` if another model has this class",
        )


def _report_no_match(
    clause: Clause, selector: Selector, target: Target, inventory: Inventory, report: Report
) -> None:
    entries = inventory.modules if target == "modules" else inventory.parameters
    report.add(
        "selector-matches-nothing",
        f"the selector matches nothing in `{inventory.model}`",
        clause,
        part="on",
        label=f"0 of {len(entries)} {target}",
        help=suggestion(selector, inventory, target),
    )


def _trainable(
    names: Sequence[str], clause: Clause, inventory: Inventory, report: Report
) -> tuple[str, ...]:
    """Return the parameters that are not frozen; to select only frozen ones is a mistake."""
    frozen = {name for name in names if not inventory.parameter[name].trainable}
    if frozen and len(frozen) == len(names):
        report.add(
            "selector-matches-frozen",
            f"all {len(frozen)} selected parameters are frozen",
            clause,
            part="on",
            help="set `requires_grad = True` on these parameters, or select others",
        )
    return tuple(name for name in names if name not in frozen)
