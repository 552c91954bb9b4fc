"""What the selectors of a clause match in the model, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainc.compiler.bind.report import Report, shared_note
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import Target, expectations, select
from trainc.compiler.model.suggestions import suggestion, unknown_classes
from trainc.dsl.reading.fields import field_type
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.source import Span
from trainc.dsl.values.value_json import Scoped, Selector

_TRAINABLE_ONLY = ("optimizer", "lr", "mask")
"""The kinds whose clauses leave frozen parameters out of their selection."""


def check_fields(
    clause: Clause, targets: Sequence[str], inventory: Inventory, report: Report
) -> None:
    """Report what is wrong with the selectors in the fields of a clause that selects `targets`.

    They are held to what `on` is held to. Numbers for a selection have to reach a target, and no target twice.
    """
    for name, info in type(clause.construct).model_fields.items():
        own = field_type(info)
        if own is None or own.selects is None:
            continue
        value = getattr(clause.construct, name)
        entries = value if isinstance(value, tuple | list) else (value,)
        chosen: list[tuple[Scoped, tuple[str, ...]]] = []
        for entry in entries:
            selector = entry.on if isinstance(entry, Scoped) else entry
            place = _Place(clause, name, selector)
            if isinstance(selector, Selector):
                names = _selected(place, own.selects, inventory, report)
                if names is None:
                    continue
            else:
                names = tuple(targets)
            if isinstance(entry, Scoped):
                reached = tuple(n for n in names if n in set(targets))
                if names and not reached and targets and not clause.optional:
                    _report_outside(place, len(names), report)
                chosen.append((entry, reached))
        _report_overlap(clause, name, chosen, inventory, report)


def select_targets(
    clause: Clause, target: Target, inventory: Inventory, report: Report
) -> tuple[str, ...]:
    """Return the names that `on`, or else the construct's default, matches; mistakes go to `report`."""
    selector = clause.selection
    if selector is None:
        report.add("missing-field", f"`{clause.construct.title}` needs `on SELECTOR`", clause)
        return ()
    names = _selected(_Place(clause, "on", selector), target, inventory, report)
    if target == "parameters" and clause.construct.kind in _TRAINABLE_ONLY:
        names = _trainable(names or (), clause, inventory, report)
    return names or ()


@dataclass(frozen=True, slots=True)
class _Place:
    """A selector of a clause: in `on`, or in a field."""

    clause: Clause
    part: str
    selector: Any

    @property
    def span(self) -> Span | None:
        """Return where the selector was written: in a list, the entry that holds it."""
        whole = self.clause.part_span(self.part)
        texts = [str(self.selector)]
        if isinstance(self.selector, Scoped):  # its number may be written in another form
            texts.append(str(self.selector.on))
        for text in texts:
            if whole is not None and (found := whole.text.rfind(text)) >= 0:
                return whole.part(found, found + len(text))
        return whole

    @property
    def what(self) -> str:
        """Return the words for it in a message."""
        return "the selector" if self.part == "on" else f"the selector in `{self.part}`"


def _selected(
    place: _Place, target: Target, inventory: Inventory, report: Report
) -> tuple[str, ...] | None:
    """Return the names that a selector matches, and report what is wrong with it; None where it cannot be read."""
    clause, selector = place.clause, place.selector
    try:
        for expect, count in expectations(selector, inventory, target):
            if expect.count != count:
                message = f"{place.what} matches {count} {target}, not {expect.count}"
                report.add("selector-count", message, clause, span=place.span)
        names = select(selector, inventory, target)
    except ValueError as error:
        report.add("bad-value", str(error), clause, span=place.span)
        return None
    if not names and not clause.optional:
        _report_no_match(place, target, inventory, report)
    elif not clause.optional:
        _report_unknown_classes(place, inventory, report)
    return names


def _report_outside(place: _Place, count: int, report: Report) -> None:
    clause = place.clause
    report.add(
        "selector-matches-nothing",
        f"{place.what} matches nothing that this `{clause.construct.title}` acts on",
        clause,
        span=place.span,
        label=f"none of these {count} parameters is one of the clause's",
        help="select parameters that the clause's `on` matches and that train, or remove the entry",
    )


def _report_overlap(
    clause: Clause,
    field: str,
    chosen: Sequence[tuple[Scoped, Sequence[str]]],
    inventory: Inventory,
    report: Report,
) -> None:
    """Report the first entries of a field that give two numbers to one parameter."""
    first: dict[str, Scoped] = {}
    for entry, names in chosen:
        for name in names:
            if (other := first.setdefault(name, entry)) is entry:
                continue
            where = [str(x.on) for x in (entry, other) if x.on is not None]
            report.add(
                "claimed-twice",
                f"two entries of `{field}` give a number to `{name}`",
                clause,
                span=_Place(clause, field, entry).span,
                notes=(
                    f"the entries are `{other}` and `{entry}`",
                    *shared_note(inventory.parameter[name]),
                ),
                help=f"say what the other entry is for: `on trainable - ({where[0]})`"
                if len(where) == 1
                else f"change one of the two selectors so that it does not match `{name}`",
            )
            return


def _report_unknown_classes(place: _Place, inventory: Inventory, report: Report) -> None:
    """Report the classes in a selector that do not exist, each at its name if the text contains it."""
    for name, help_ in unknown_classes(place.selector, inventory).items():
        whole = place.span
        word = re.search(rf"\b{re.escape(name)}\b", whole.text) if whole else None
        report.add(
            "unknown-class",
            f"neither `{inventory.model}` nor torch.nn has a class `{name}`",
            place.clause,
            span=whole.part(*word.span()) if whole and word else whole,
            help=help_
            or "remove the name, or make the clause `optional` if another model has this class",
        )


def _report_no_match(place: _Place, target: Target, inventory: Inventory, report: Report) -> None:
    entries = inventory.modules if target == "modules" else inventory.parameters
    report.add(
        "selector-matches-nothing",
        f"{place.what} matches nothing in `{inventory.model}`",
        place.clause,
        span=place.span,
        label=f"0 of {len(entries)} {target}",
        help=suggestion(place.selector, inventory, target),
    )


def _trainable(
    names: Sequence[str], clause: Clause, inventory: Inventory, report: Report
) -> tuple[str, ...]:
    """Return the parameters that are not frozen; to select only frozen ones is a mistake."""
    frozen = {name for name in names if not inventory.parameter[name].trainable}
    if frozen and len(frozen) == len(names):
        way = "set `requires_grad = True` on these parameters"
        if inventory.has_adapters:
            way += ", name them in `train` of the clause that adds adapters, which freezes the rest"
        report.add(
            "selector-matches-frozen",
            f"all {len(frozen)} selected parameters are frozen",
            clause,
            part="on",
            help=f"{way}, or select others",
        )
    return tuple(name for name in names if name not in frozen)
