"""What a checked spec is made of: clauses, and rules with their actions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.field_types import CONDITION, DURATION, EXPRESSION, SELECTOR
from trainc.dsl.resolve.origin import Origin, Provenance
from trainc.dsl.text.record import Record, uncompared
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import KINDS, METRICS, VERBS
from trainc.dsl.values.value_json import Duration, Expr, Selector, to_json


class ComparedByJson(Record):
    """A value that is compared and hashed by its JSON."""

    def to_json(self) -> Any:
        raise NotImplementedError

    @cached_property
    def _text(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


class Clause(ComparedByJson):
    """One construct, what it acts on and when; text for a part is parsed as in a spec.

    Where `every` is left out it is the construct's `default_every`, for all who read the clause.
    """

    construct: Construct
    on: Selector | None = None
    start: Duration | None = None
    stop: Duration | None = None
    every: Duration | None = None
    optional: bool = False
    label: str | None = None
    origin: Origin | None = uncompared(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.every is None:
            self._set("every", self.construct.default_every)
        for name, kind in (
            ("on", SELECTOR),
            ("start", DURATION),
            ("stop", DURATION),
            ("every", DURATION),
        ):
            value = getattr(self, name)
            if value is not None:
                self._set(name, kind.accept(value))

    @property
    def kind(self) -> str:
        return self.construct.kind

    @property
    def name(self) -> str:
        """Return the name that conditions use: the label, or the name of the construct.

        A construct that is called as a kind, or as what every run measures, has its own kind behind it: `model_loss`
        of `loss model`.
        """
        name, kind = self.construct.name, self.construct.kind
        taken = name in (*KINDS, *METRICS) and name != kind
        return self.label or (f"{name}_{kind}" if taken else name)

    @property
    def title(self) -> str:
        """Return how messages refer to it: `regularize NAME as early`."""
        return f"{self.construct.title} as {self.label}" if self.label else self.construct.title

    @property
    def span(self) -> Span | None:
        """Return where it was written, or None for a spec made in Python."""
        return self.origin.span if self.origin else None

    def part_span(self, part: str) -> Span | None:
        """Return where `on`, `every` ... or a field was written; the whole clause where it was not."""
        return None if self.origin is None else self.origin.part_span(part)

    @property
    def paced_by_default(self) -> bool:
        """Say whether `every` is the construct's own interval, and was not written."""
        own = self.construct.default_every
        written = self.origin is not None and "every" in self.origin.parts
        return own is not None and not written and self.every == DURATION.accept(own)

    def provenance(self, name: str) -> Provenance:
        """Return where a field's value comes from."""
        if self.origin is None:
            given = name in self.construct.model_fields_set
            return Provenance("python" if given else "default")
        return self.origin.fields.get(name, Provenance("default"))

    @property
    def selection(self) -> Selector | None:
        """Return `on`, or the default of the construct."""
        if self.on is not None or self.construct.default_on is None:
            return self.on
        selector: Selector = SELECTOR.accept(self.construct.default_on)
        return selector

    def to_json(self) -> Any:
        return {
            "kind": self.construct.kind,
            "name": self.construct.name,
            "fields": self.construct.model_dump(mode="json"),
            "on": None if self.on is None else to_json(self.on),
            "from": self.start and to_json(self.start),
            "until": self.stop and to_json(self.stop),
            "every": self.every and to_json(self.every),
            "optional": self.optional,
            "label": self.label,
        }


class Assign(Record):
    """`target = value`; the target is `batch`, or a scheduled field of a clause, `label.field`."""

    target: str
    value: Expr

    def __post_init__(self) -> None:
        self._set("value", EXPRESSION.accept(self.value))

    @property
    def label(self) -> str:
        """Return the label of the clause whose field it sets; empty for the batch."""
        return self.target.rpartition(".")[0]


class Do(Record):
    """`stop`, `warn "text"`, `close pace`, `freeze "blocks.*"`: a verb of dsl/resolve/rule_actions.py."""

    verb: str
    argument: str | Selector | None = None

    def __post_init__(self) -> None:
        if VERBS.get(self.verb) == "selector" and self.argument is not None:
            self._set("argument", SELECTOR.accept(self.argument))


Action = Assign | Do


class Rule(ComparedByJson):
    """`when condition for hold cooldown rest { actions }`."""

    condition: Expr
    actions: tuple[Action, ...]
    hold: Duration | None = None
    cooldown: Duration | None = None
    origin: Origin | None = uncompared(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._set("condition", CONDITION.accept(self.condition))
        self._set("actions", tuple(self.actions))
        for name in ("hold", "cooldown"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, DURATION.accept(value))

    @property
    def span(self) -> Span | None:
        """Return where it was written, or None for a spec made in Python."""
        return self.origin.span if self.origin else None

    def part_span(self, part: str) -> Span | None:
        """Return where `condition`, `for`, `cooldown` or `action 1` was written; the whole rule where it was not."""
        return None if self.origin is None else self.origin.part_span(part)

    def expressions(self) -> Iterator[tuple[str, Expr]]:
        """Yield its condition and the values that it assigns, each with the name of its part."""
        yield "condition", self.condition
        for i, action in enumerate(self.actions, 1):
            if isinstance(action, Assign):
                yield f"action {i}", action.value

    def to_json(self) -> Any:
        return {
            "condition": to_json(self.condition),
            "for": self.hold and to_json(self.hold),
            "cooldown": self.cooldown and to_json(self.cooldown),
            "actions": [
                ["assign", a.target, to_json(a.value)]
                if isinstance(a, Assign)
                else [
                    "do",
                    a.verb,
                    to_json(a.argument) if isinstance(a.argument, Selector) else a.argument,
                ]
                for a in self.actions
            ],
        }
