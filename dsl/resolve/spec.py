"""The checked spec: frozen, hashed, JSON both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.resolve.checks import spec_problems, unknown_construct
from trainc.dsl.resolve.statements import Action, Assign, Clause, ComparedByJson, Do, Rule
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import VERBS
from trainc.dsl.values.value_json import expr_from_json, selector_from_json

VERSION = 1


class Spec(ComparedByJson):
    """A training method: clauses and rules. Raises SpecError where they do not fit together."""

    clauses: tuple[Clause, ...] = ()
    rules: tuple[Rule, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        self._set("clauses", tuple(self.clauses))
        self._set("rules", tuple(self.rules))
        errors = [d for d in spec_problems(self.clauses, self.rules) if d.severity == "error"]
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

    @cached_property
    def fields_set(self) -> frozenset[str]:
        """Return the fields of clauses that rules set, as `label.field`."""
        actions = (action for rule in self.rules for action in rule.actions)
        return frozenset(a.target for a in actions if isinstance(a, Assign) and a.label)

    @cached_property
    def switched(self) -> dict[str, Span | None]:
        """Return the names of the clauses that rules open or close, each with the place where the first does."""
        found: dict[str, Span | None] = {}
        for rule in self.rules:
            for i, action in enumerate(rule.actions, 1):
                if isinstance(action, Do) and VERBS[action.verb] == "clause":
                    found.setdefault(str(action.argument), rule.part_span(f"action {i}"))
        return found

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
        try:
            if isinstance(data, (str, bytes)):
                data = json.loads(data)
            clauses = tuple(_clause_from_json(item, catalog) for item in data["clauses"])
            rules = tuple(_rule_from_json(item) for item in data["rules"])
            return cls(clauses, rules, data["version"])
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"this is not the JSON that `Spec.to_json` writes ({type(error).__name__}: {error})"
            ) from error


def _clause_from_json(data: Any, catalog: Catalog) -> Clause:
    key = (data["kind"], data["name"])
    if key not in catalog:
        raise SpecError([unknown_construct(*key, catalog)])
    return Clause(
        catalog[key].model_validate(_written(data["fields"], catalog[key])),
        None if data["on"] is None else selector_from_json(data["on"]),
        data["from"],
        data["until"],
        data["every"],
        data["optional"],
        data["label"],
    )


def _written(fields: dict[str, Any], construct: type[Construct]) -> dict[str, Any]:
    """Return the fields that a user must have written: a field that another one forbids may have its default."""
    defaults = construct.model_construct().model_dump(mode="json")
    return {n: value for n, value in fields.items() if n not in defaults or defaults[n] != value}


def _verb(verb: str, argument: Any) -> Do:
    return Do(verb, selector_from_json(argument) if isinstance(argument, list) else argument)


def _rule_from_json(data: Any) -> Rule:
    actions: Iterable[Action] = (
        Assign(target, expr_from_json(value)) if tag == "assign" else _verb(target, value)
        for tag, target, value in data["actions"]
    )
    condition = expr_from_json(data["condition"])
    return Rule(condition, tuple(actions), data["for"], data.get("cooldown"))
