"""The fields of one clause: each read as its type says, then all of them validated together."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from trainc.dsl.reading.constants import Unreadable, plain_value
from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.field_errors import problem_text
from trainc.dsl.reading.field_types import IMPORT_PATH
from trainc.dsl.reading.fields import field_type, read_field
from trainc.dsl.reading.names import Scope
from trainc.dsl.resolve.includes import PlacedStatement
from trainc.dsl.resolve.lets import Lets
from trainc.dsl.resolve.origin import Provenance
from trainc.dsl.syntax import ast
from trainc.dsl.text.diagnostic import Diagnostic, Diagnostics, Edit, Label, repetition
from trainc.dsl.text.nearest import nearest, suggest
from trainc.dsl.text.source import Span, printable

_PATH = "path"  # the field of the string in brackets


def unreadable_problem(error: Unreadable, where: Span, message: str, lets: Lets) -> Diagnostic:
    """Return the diagnostic for an unreadable node; inside a `let` it also has a label at the use of the `let`."""
    labels = [Label(error.span, error.text)]
    if error.span not in where:
        labels.append(Label(where, "used here"))
    help = suggest(error.span.text, lets.values) if error.rule == "unknown-name" else None
    edit = None
    if help is None and error.edit is not None:
        edit = Edit(error.span, error.edit, error.safe)
    return Diagnostic(
        error.rule, error.message or message, tuple(labels), (), help or error.help, edit=edit
    )


def with_use(d: Diagnostic, span: Span) -> Diagnostic:
    """Add a label where a value is used to a diagnostic that points into a `let`."""
    if d.span is None or d.span in span or any(label.span == span for label in d.labels):
        return d
    return d.replace(labels=(*d.labels, Label(span, "used here")))


def is_lost(node: ast.Node, lets: Lets, scope: Scope) -> bool:
    """Say whether a node uses a name whose definition has an error, which is reported already."""
    todo = [node]
    while todo:
        item = todo.pop()
        if isinstance(item, ast.Ident) and (item.id in scope.lost or "*" in scope.lost):
            return item.id not in lets.values or item.id in lets.broken
        todo += ast.children(item)
    return False


def _is_missing(detail: Any) -> bool:
    """Say whether a field is missing, not an entry of its value."""
    return detail["type"] == "missing" and len(detail["loc"]) == 1


class FieldResolver:
    """Resolves the fields of one clause."""

    def __init__(self, cls: type[Construct], head: Span, lets: Lets, scope: Scope) -> None:
        self.cls = cls
        self.head = head
        self.lets = lets
        self.scope = scope
        self.found = Diagnostics()
        self.origin: dict[str, Provenance] = {}
        self.first: dict[str, ast.Field] = {}
        self.failed: set[str] = set()
        self.unmatched: list[Diagnostic] = []
        """Fields that there are not, and that resemble none: one of them may be meant for a field that is missing."""
        self.data: dict[str, Any] = {}
        self.arguments: dict[str, Any] = {}
        hidden = {_PATH, "arguments"} if cls.open_fields else {_PATH}
        self.declared = [name for name in cls.model_fields if name not in hidden]

    def resolve(self, tree: ast.ClauseTree, placed: PlacedStatement) -> Construct | None:
        """Return the construct, or None where a field is wrong or missing."""
        self._path(tree)
        for item in tree.fields or ():
            name = item.name.id
            if name in self.first:
                labels = repetition(item.name.span, self.first[name].name.span)
                self.found.report("duplicate-field", f"`{name}` is given twice", *labels)
                continue
            self.first[name] = item
            self.origin[name] = self._provenance(item, placed)
            if name not in self.declared and not self.cls.open_fields:
                self._unknown(item)
            elif is_lost(item.value, self.lets, self.scope):
                self.failed.add(name)
            else:
                self._read(item)
        if self.arguments:
            self.data["arguments"] = self.arguments
        try:
            return self.cls.model_validate(self.data)
        except ValidationError as error:
            blamed = {near for n in self.failed if (near := nearest(n, self.cls.model_fields))}
            for detail in error.errors(include_url=False):
                name = str(detail["loc"][0]) if detail["loc"] else ""
                # A misspelling is one mistake: it is reported where it was written.
                known = name in self.failed or (_is_missing(detail) and name in blamed)
                # Fields that could not be read are not among those that were compared.
                known = known or (not name and bool(self.failed))
                if not known and _is_missing(detail) and self.unmatched:
                    self._blame(name)
                    continue
                if not known:
                    self._invalid(detail, name)
                if name:
                    self.failed.add(name)
            return None

    def _path(self, tree: ast.ClauseTree) -> None:
        if tree.path is None:
            return
        title = self.cls.heading()
        if _PATH not in self.cls.model_fields:
            label = Label(tree.path.span, "remove this path")
            self.found.report("unexpected-path", f"`{title}` takes no import path", label)
            return
        try:
            self.data[_PATH] = read_field(self.cls.model_fields[_PATH], tree.path)
        except Unreadable as error:
            self.failed.add(_PATH)
            message = f"invalid import path for `{title}`"
            self.found.append(unreadable_problem(error, tree.path.span, message, self.lets))

    def _read(self, item: ast.Field) -> None:
        """Read one field; the scope reports names that it may not use."""
        name, count = item.name.id, len(self.scope.found)
        declared = name in self.declared
        try:
            node = self.lets.expand(item.value)
            if declared:
                self.data[name] = read_field(self.cls.model_fields[name], node, self.scope)
            else:
                self.arguments[name] = plain_value(node)
        except Unreadable as error:
            self.failed.add(name)
            if not declared and nearest(name, self.declared):
                self._unknown(item)
                return
            message = f"invalid `{printable(name)}` for `{self.cls.heading()}`"
            d = unreadable_problem(error, item.value.span, message, self.lets)
            notes = () if error.message else self._field_note(name)
            self.found.append(d.replace(notes=notes))
        new = self.scope.found[count:]
        if new:
            self.scope.found[count:] = [with_use(d, item.value.span) for d in new]
            self.failed.add(name)

    def _unknown(self, item: ast.Field) -> None:
        self.failed.add(item.name.id)
        message = f"`{self.cls.heading()}` has no field `{printable(item.name.id)}`"
        near = nearest(item.name.id, self.declared)
        known = f"known fields: {', '.join(f'`{n}`' for n in self.declared) or 'none'}"
        more: dict[str, Any] = {"notes": (known,)}
        if near:
            more = {
                "help": f"did you mean `{near}`?",
                "edit": Edit(item.name.span, near, safe=True),
            }
        self.found.report("unknown-field", message, Label(item.name.span), **more)
        if not near:
            self.unmatched.append(self.found[-1])

    def _blame(self, name: str) -> None:
        """Say of an unknown field that it may be meant to be one that is missing."""
        d = self.unmatched.pop(0)
        assert d.span is not None
        help = f"is it meant to be `{name}`, which `{self.cls.heading()}` needs?"
        self.found[self.found.index(d)] = d.replace(help=help, edit=Edit(d.span, name))

    def _provenance(self, item: ast.Field, placed: PlacedStatement) -> Provenance:
        """Return where a value comes from; `--set` where it depends on a let that was set."""
        for name in sorted(self.lets.names_in(item.value)):
            if name in self.lets.overridden:
                return Provenance("set", self.lets.overridden[name].span.source.span())
        return Provenance("include" if placed.via else "line", item.value.span, placed.via)

    def _invalid(self, detail: Any, name: str) -> None:
        """Report an error of pydantic at the field's place in the text."""
        title = self.cls.heading()
        if _is_missing(detail):
            self._missing(name)
            return
        text, help = problem_text(detail)
        if name not in self.first:
            labels = self._fields_named_in(text) or (Label(self.head, text),)
            self.found.report("bad-value", f"fields of `{title}` do not fit together", *labels)
            return
        rule = "wrong-unit" if detail["type"] == "wrong_unit" else "bad-value"
        label = Label(self.first[name].value.span, text)
        message, notes = f"invalid `{name}` for `{title}`", self._field_note(name)
        self.found.report(rule, message, label, help=help, notes=notes)

    def _fields_named_in(self, text: str) -> tuple[Label, ...]:
        """Return labels at the fields that a message names, the last field first.

        A check of a construct names fields in backticks: `group`, or `group = 8`.
        """
        named = re.findall(r"`(\w+)[^`]*`", text)
        given = [item for name, item in self.first.items() if name in named]
        spans = sorted((item.name.span | item.value.span for item in given), key=lambda s: s.start)
        labels = [Label(span, "in conflict with this") for span in reversed(spans)]
        return (labels[0].replace(text=text), *labels[1:]) if labels else ()

    def _missing(self, name: str) -> None:
        title = self.cls.heading()
        if name == _PATH:
            imports = field_type(self.cls.model_fields[_PATH]) is IMPORT_PATH
            what, text = (
                ("an import path", "module:name") if imports else ("a pattern of files", "data/*")
            )
            form = f'{title} "{text}"' if self.cls.kind == self.cls.name else f'{title}("{text}")'
            message, help = f"`{title}` needs {what}", f"write `{form}`"
            self.found.report("missing-field", message, Label(self.head), help=help)
            return
        near = nearest(name, self.arguments)
        meant = f"is `{near}` meant to be `{name}`?" if near else None
        message, notes = f"`{title}` needs the field `{name}`", self._field_note(name)
        self.found.report("missing-field", message, Label(self.head), help=meant, notes=notes)

    def _field_note(self, name: str) -> tuple[str, ...]:
        """Return the description of a field as a note."""
        if name in self.declared:
            description = self.cls.model_fields[name].description
            return (f"{name}: {description}",) if description else ()
        return (
            f"`{self.cls.heading()}` passes this field to the imported callable: write a plain value",
        )
