"""The checked spec: frozen, hashed, JSON both ways; where it was written rides along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.record import Record, aside
from trainc.dsl.text.source import Span
from trainc.dsl.values.value_json import (
    Duration,
    Expr,
    Selector,
    expr_from_json,
    selector_from_json,
    to_json,
)

VERSION = 1


class Provenance(Record):
    """Where a value comes from: a default, a line, a line of an included file, or `--set`."""

    how: Literal["default", "line", "include", "set", "python"]
    span: Span | None = None
    via: tuple[Span, ...] = ()

    def __str__(self) -> str:
        if self.how in ("default", "python") or self.span is None:
            return self.how
        chain = "".join(f", included at {use}" for use in reversed(self.via))
        return f"--set {self.span.text}" if self.how == "set" else f"{self.span}{chain}"


class Origin(Record):
    """Where a clause or rule was written, and each of its parts and fields."""

    span: Span
    fields: Mapping[str, Provenance] = {}
    parts: Mapping[str, Span] = {}


class _ByJson(Record):
    """Equal where the JSON is, and hashed alike."""

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


class Clause(_ByJson):
    """One construct applied to a selection for a time; strings are read as a spec's text is."""

    construct: Construct
    on: Selector | None = None
    start: Duration | None = None
    stop: Duration | None = None
    every: Duration | None = None
    optional: bool = False
    label: str | None = None
    origin: Origin | None = aside(default=None, kw_only=True)

    def __post_init__(self) -> None:
        from trainc.dsl.reading.field_types import DURATION, SELECTOR

        for name, kind in (
            ("on", SELECTOR),
            ("start", DURATION),
            ("stop", DURATION),
            ("every", DURATION),
        ):
            value = getattr(self, name)
            if value is not None:
                self._put(name, kind.accept(value))

    @property
    def kind(self) -> str:
        return self.construct.kind

    @property
    def name(self) -> str:
        """Return the name that conditions use: the label, or else the construct's."""
        return self.label or self.construct.name

    @property
    def title(self) -> str:
        """Return what messages call it."""
        return f"{self.construct.title} as {self.label}" if self.label else self.construct.title

    @property
    def span(self) -> Span | None:
        """Return where it was written, or None for a spec made in Python."""
        return self.origin.span if self.origin else None

    def part_span(self, part: str) -> Span | None:
        """Return where `on`, `every` ... or a field was written, or else the clause."""
        if self.origin is None:
            return None
        provenance = self.origin.fields.get(part)
        found = provenance.span if provenance else self.origin.parts.get(part)
        return found or self.origin.span

    def provenance(self, name: str) -> Provenance:
        """Return where a field's value comes from."""
        if self.origin is None:
            given = name in self.construct.model_fields_set
            return Provenance("python" if given else "default")
        return self.origin.fields.get(name, Provenance("default"))

    @property
    def selection(self) -> Selector | None:
        """Return `on`, or else the construct's default."""
        if self.on is not None or self.construct.default_on is None:
            return self.on
        from trainc.dsl.reading.field_types import SELECTOR

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
    """`target = value`; the target is `batch`."""

    target: str
    value: Expr

    def __post_init__(self) -> None:
        from trainc.dsl.reading.field_types import EXPRESSION

        self._put("value", EXPRESSION.accept(self.value))


class Do(Record):
    """`stop`, `save`, or `warn "text"`."""

    verb: str
    argument: str | None = None


Action = Assign | Do


class Rule(_ByJson):
    """`when condition for hold cooldown rest { actions }`."""

    condition: Expr
    actions: tuple[Action, ...]
    hold: Duration | None = None
    cooldown: Duration | None = None
    origin: Origin | None = aside(default=None, kw_only=True)

    def __post_init__(self) -> None:
        from trainc.dsl.reading.field_types import CONDITION, DURATION

        self._put("condition", CONDITION.accept(self.condition))
        self._put("actions", tuple(self.actions))
        for name in ("hold", "cooldown"):
            value = getattr(self, name)
            if value is not None:
                self._put(name, DURATION.accept(value))

    @property
    def span(self) -> Span | None:
        """Return where it was written, or None for a spec made in Python."""
        return self.origin.span if self.origin else None

    def to_json(self) -> Any:
        return {
            "condition": to_json(self.condition),
            "for": self.hold and to_json(self.hold),
            "cooldown": self.cooldown and to_json(self.cooldown),
            "actions": [
                ["assign", a.target, to_json(a.value)]
                if isinstance(a, Assign)
                else ["do", a.verb, a.argument]
                for a in self.actions
            ],
        }


class Spec(_ByJson):
    """A training method; making one checks what no clause can see alone."""

    clauses: tuple[Clause, ...] = ()
    rules: tuple[Rule, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        from trainc.dsl.resolve.checks import inconsistencies

        self._put("clauses", tuple(self.clauses))
        self._put("rules", tuple(self.rules))
        errors = [d for d in inconsistencies(self.clauses, self.rules) if d.severity == "error"]
        if self.version != VERSION:
            errors.append(
                Diagnostic("unknown-version", f"there is no version {self.version} of the language")
            )
        if errors:
            raise SpecError(errors)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 of the canonical JSON."""
        return hashlib.sha256(self._text.encode("utf-8", "surrogatepass")).hexdigest()

    def of_kind(self, kind: str) -> tuple[Clause, ...]:
        """Return the clauses of a kind, in the order they were written."""
        return tuple(clause for clause in self.clauses if clause.kind == kind)

    def one(self, kind: str) -> Clause | None:
        """Return the first clause of a kind, or None: for kinds of which there is at most one."""
        return next(iter(self.of_kind(kind)), None)

    def to_json(self) -> Any:
        return {
            "version": self.version,
            "clauses": [clause.to_json() for clause in self.clauses],
            "rules": [rule.to_json() for rule in self.rules],
        }

    @classmethod
    def from_json(cls, data: Any, catalog: Catalog) -> Spec:
        """Return the spec that `to_json` wrote, given as data or as text."""
        if isinstance(data, (str, bytes)):
            data = json.loads(data)
        try:
            clauses = tuple(_clause_from_json(item, catalog) for item in data["clauses"])
            rules = tuple(_rule_from_json(item) for item in data["rules"])
            return cls(clauses, rules, data["version"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of a spec: {error!r}") from error


def _clause_from_json(data: Any, catalog: Catalog) -> Clause:
    key = (data["kind"], data["name"])
    if key not in catalog:
        raise SpecError([unknown_construct(*key, catalog)])
    return Clause(
        catalog[key].model_validate(data["fields"]),
        None if data["on"] is None else selector_from_json(data["on"]),
        data["from"],
        data["until"],
        data["every"],
        data["optional"],
        data["label"],
    )


def _rule_from_json(data: Any) -> Rule:
    actions: Iterable[Action] = (
        Assign(target, expr_from_json(value)) if tag == "assign" else Do(target, value)
        for tag, target, value in data["actions"]
    )
    condition = expr_from_json(data["condition"])
    return Rule(condition, tuple(actions), data["for"], data.get("cooldown"))


def unknown_construct(kind: str, name: str, catalog: Catalog) -> Diagnostic:
    """Return the diagnostic for a construct that is not in the catalog."""
    names = sorted(n for k, n in catalog if k == kind)
    known = f"`{kind}` has {', '.join(f'`{n}`' for n in names)}" if names else f"`{kind}` has none"
    message = f"`{kind}` has no construct `{name}`"
    return Diagnostic("unknown-construct", message, (), (known,), suggest(name, names))
