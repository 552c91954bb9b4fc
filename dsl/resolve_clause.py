"""One clause: its construct, its parts, its fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from trainc.dsl import ast
from trainc.dsl.consistency import on_problems
from trainc.dsl.construct import Catalog, Construct
from trainc.dsl.diagnostics import Diagnostic, Label, nearest, suggest
from trainc.dsl.fields import read_field
from trainc.dsl.gather import Placed
from trainc.dsl.invalid import problem_text
from trainc.dsl.lets import Lets
from trainc.dsl.lexer import printable
from trainc.dsl.read import Unreadable, duration, import_path, plain
from trainc.dsl.read_selector import selector
from trainc.dsl.scope import Scope
from trainc.dsl.source import Span
from trainc.dsl.spec import Clause, Origin, Provenance, unknown_construct

_READ = {"on": selector, "from": duration, "until": duration, "every": duration}
_ROLE = {
    "on": "`on` takes a selector",
    "from": "`from` takes a duration",
    "until": "`until` takes a duration",
    "every": "`every` takes a duration",
}
_HIDDEN = {"path", "arguments"}


def construct_name(tree: ast.ClauseTree, catalog: Catalog) -> str | None:
    """Return the construct a clause names; `model`, `data` and `run` name themselves."""
    if tree.construct is not None:
        return tree.construct.id
    kind = tree.kind.id
    return kind if kind == "run" or (kind, kind) in catalog or kind in ("model", "data") else None


def place(error: Unreadable, where: Span, message: str, lets: Lets) -> Diagnostic:
    """Return the diagnostic for an unreadable node, and where it is used if that is elsewhere."""
    labels = [Label(error.span, error.text)]
    if error.span not in where:
        labels.append(Label(where, "used here"))
    help = suggest(error.span.text, lets.values) if error.rule == "unknown-name" else None
    return Diagnostic(error.rule, error.message or message, tuple(labels), (), help or error.help)


def used_at(d: Diagnostic, span: Span) -> Diagnostic:
    """Add where a value is used to a diagnostic that points into a `let`."""
    if d.span is None or d.span in span or any(label.span == span for label in d.labels):
        return d
    return replace(d, labels=(*d.labels, Label(span, "used here")))


class ClauseResolver:
    """Resolves clauses one by one against a catalog."""

    def __init__(self, catalog: Catalog, lets: Lets, scope: Scope) -> None:
        self.catalog = catalog
        self.lets = lets
        self.scope = scope
        self.found: list[Diagnostic] = []

    def resolve(self, tree: ast.ClauseTree, placed: Placed) -> Clause | None:
        """Return the clause, or None where something about it is wrong."""
        before = len(self.found) + len(self.scope.found)
        head = tree.kind.span | (tree.construct or tree.path or tree.kind).span
        parts = self._parts(tree)
        cls = self._construct(tree)
        if cls is None:
            return None
        spans = {part.word: (part.value.span if part.value else part.span) for part in tree.parts}
        self.found += on_problems(cls, "on" in spans, head, spans.get("on"))
        origin: dict[str, Provenance] = {}
        construct = self._fields(tree, cls, head, placed, origin)
        if construct is None or len(self.found) + len(self.scope.found) > before:
            return None
        names = {"from": "start", "until": "stop"}
        given = {names.get(word, word): value for word, value in parts.items()}
        return Clause(construct, **given, origin=Origin(tree.span, origin, {**spans, "head": head}))

    def _construct(self, tree: ast.ClauseTree) -> type[Construct] | None:
        kind, name = tree.kind.id, construct_name(tree, self.catalog)
        if name is None:
            assert tree.path is not None
            label = Label(tree.path.span, "expected the name of a construct")
            help = None
            if any(k == kind and "path" in c.model_fields for (k, _), c in self._of(kind)):
                other = next(n for (_, n), c in self._of(kind) if "path" in c.model_fields)
                help = f'write `{kind} {other}("{printable(tree.path.value)}")`'
            self.found.append(
                Diagnostic("unknown-construct", f"`{kind}` takes no path", (label,), (), help)
            )
            return None
        cls = self.catalog.get((kind, name))
        if cls is not None:
            return cls
        d = unknown_construct(kind, printable(name), self.catalog)
        span = (tree.construct or tree.kind).span
        help = d.help
        if kind in ("model", "data") and tree.construct and not tree.path:
            help = f'a {kind} is named by where to import it from: `{kind} "module:{name}"`'
        self.found.append(Diagnostic(d.rule, d.message, (Label(span),), d.notes, help))
        return None

    def _of(self, kind: str) -> list[tuple[tuple[str, str], type[Construct]]]:
        return [(key, self.catalog[key]) for key in self.catalog if key[0] == kind]

    def _parts(self, tree: ast.ClauseTree) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, ast.Part] = {}
        for part in tree.parts:
            if part.word in first:
                labels = (
                    Label(part.span, "a second one"),
                    Label(first[part.word].span, "the first is here"),
                )
                self.found.append(
                    Diagnostic("duplicate-part", f"`{part.word}` is given twice", labels)
                )
                continue
            first[part.word] = part
            if part.word == "optional":
                out["optional"] = True
            elif part.word == "as":
                assert isinstance(part.value, ast.Ident)
                if "." in part.value.id:
                    label = Label(part.value.span, "expected a name without a dot")
                    self.found.append(Diagnostic("reserved-name", "a label has no dot", (label,)))
                out["label"] = part.value.id
            elif part.value is not None and not self._lost(part.value):
                try:
                    out[part.word] = _READ[part.word](self.lets.expand(part.value))
                except Unreadable as error:
                    self.found.append(place(error, part.value.span, _ROLE[part.word], self.lets))
        return out

    def _lost(self, node: ast.Node) -> bool:
        """Say whether a node stands on a name whose definition is broken, and reported."""
        todo = [node]
        while todo:
            item = todo.pop()
            if isinstance(item, ast.Ident) and (
                item.id in self.scope.lost or "*" in self.scope.lost
            ):
                return item.id not in self.lets.values or item.id in self.lets.broken
            todo += ast.children(item)
        return False

    def _fields(
        self,
        tree: ast.ClauseTree,
        cls: type[Construct],
        head: Span,
        placed: Placed,
        origin: dict[str, Provenance],
    ) -> Construct | None:
        data: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        first: dict[str, ast.Field] = {}
        failed: set[str] = set()
        self._path(tree, cls, data, failed)
        for item in tree.fields or ():
            name = item.name.id
            if name in first:
                labels = (
                    Label(item.name.span, "a second one"),
                    Label(first[name].name.span, "the first is here"),
                )
                self.found.append(Diagnostic("duplicate-field", f"`{name}` is given twice", labels))
                continue
            first[name] = item
            declared = name in cls.model_fields and not (cls.open_fields and name in _HIDDEN)
            origin[name] = self._provenance(item, placed)
            if not declared and not cls.open_fields:
                self._unknown(item, cls)
                failed.add(name)
                continue
            if self._lost(item.value):
                failed.add(name)
                continue
            count = len(self.scope.found)
            try:
                node = self.lets.expand(item.value)
                if declared:
                    data[name] = read_field(cls.model_fields[name], node, self.scope)
                else:
                    arguments[name] = plain(node)
            except Unreadable as error:
                failed.add(name)
                found = place(
                    error,
                    item.value.span,
                    f"`{cls.heading()}` cannot take this `{printable(name)}`",
                )
                note = _note(cls, name) if declared and not error.message else ()
                self.found.append(
                    Diagnostic(found.rule, found.message, found.labels, note, found.help)
                )
            if len(self.scope.found) > count:
                self.scope.found[count:] = [
                    used_at(d, item.value.span) for d in self.scope.found[count:]
                ]
                failed.add(name)
        if cls.open_fields and arguments:
            data["arguments"] = arguments
        blamed = {near for name in failed if (near := nearest(name, cls.model_fields))}
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                name = str(detail["loc"][0]) if detail["loc"] else ""
                if name in failed or (detail["type"] == "missing" and name in blamed):
                    continue
                self.found.append(self._invalid(detail, name, cls, first, head))
            return None

    def _path(
        self, tree: ast.ClauseTree, cls: type[Construct], data: dict[str, Any], failed: set[str]
    ) -> None:
        if tree.path is None:
            return
        if "path" not in cls.model_fields:
            label = Label(tree.path.span, "this is not needed")
            self.found.append(
                Diagnostic("unexpected-path", f"`{cls.heading()}` imports nothing", (label,))
            )
            return
        try:
            data["path"] = import_path(tree.path)
        except Unreadable as error:
            failed.add("path")
            self.found.append(
                place(error, tree.path.span, f"`{cls.heading()}` cannot import this")
            )

    def _unknown(self, item: ast.Field, cls: type[Construct]) -> None:
        fields = [name for name in cls.model_fields if name not in _HIDDEN or not cls.open_fields]
        message = f"`{cls.heading()}` has no field `{printable(item.name.id)}`"
        known = (
            f"its fields are {', '.join(f'`{f}`' for f in fields)}"
            if fields
            else "it has no fields"
        )
        label = Label(item.name.span)
        help = suggest(item.name.id, fields)
        notes = () if help else (known,)
        self.found.append(Diagnostic("unknown-field", message, (label,), notes, help))

    def _provenance(self, item: ast.Field, placed: Placed) -> Provenance:
        """Return where a value comes from; one that depends on a setting comes from that."""
        for name in sorted(self.lets.names_in(item.value)):
            if name in self.lets.overridden:
                return Provenance("set", self.lets.overridden[name].span.source.span())
        return Provenance("include" if placed.via else "line", item.value.span, placed.via)

    def _invalid(
        self, detail: Any, name: str, cls: type[Construct], first: dict[str, ast.Field], head: Span
    ) -> Diagnostic:
        """Put what pydantic says where the author wrote the field."""
        title = cls.heading()
        if detail["type"] == "missing":
            if name == "path":
                message = f"`{title}` does not say what to import"
                written = (
                    f'{title} "module:name"' if cls.kind == cls.name else f'{title}("module:name")'
                )
                return Diagnostic(
                    "missing-field", message, (Label(head),), (), f"write `{written}`"
                )
            near = nearest(name, first) if cls.open_fields else None
            meant = f"is `{near}` meant to be `{name}`?" if near else None
            message = f"`{title}` needs `{name}`"
            return Diagnostic("missing-field", message, (Label(head),), _note(cls, name), meant)
        text, help = problem_text(detail)
        if name not in first:
            return Diagnostic(
                "bad-value", f"`{title}` does not go together", (Label(head, text),), (), help
            )
        rule = "wrong-unit" if detail["type"] == "wrong_unit" else "bad-value"
        message = f"`{title}` cannot take this `{name}`"
        label = Label(first[name].value.span, text)
        return Diagnostic(rule, message, (label,), _note(cls, name), help)


def _note(cls: type[Construct], name: str) -> tuple[str, ...]:
    description = cls.model_fields[name].description if name in cls.model_fields else None
    return (f"{name}: {description}",) if description else ()
