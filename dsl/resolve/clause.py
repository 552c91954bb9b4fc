"""One clause: its construct and its parts; dsl/resolve/clause_fields.py reads its fields."""

from __future__ import annotations

from typing import Any

from trainc.dsl.reading.constants import Unreadable, duration
from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.reading.names import Scope
from trainc.dsl.reading.selectors import selector
from trainc.dsl.resolve.checks import on_problems, unknown_construct
from trainc.dsl.resolve.clause_fields import FieldResolver, is_lost, unreadable_problem
from trainc.dsl.resolve.includes import PlacedStatement
from trainc.dsl.resolve.lets import Lets
from trainc.dsl.resolve.origin import Origin
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.syntax import ast
from trainc.dsl.text.diagnostic import Diagnostics, Edit, Label, repetition
from trainc.dsl.text.source import printable


def construct_name(tree: ast.ClauseTree, catalog: Catalog) -> str | None:
    """Return the construct a clause names; `model`, `data` and `run` name themselves."""
    if tree.construct is not None:
        return tree.construct.id
    kind = tree.kind.id
    return kind if kind == "run" or (kind, kind) in catalog or kind in ("model", "data") else None


class ClauseResolver:
    """Resolves clauses one by one against a catalog."""

    def __init__(self, catalog: Catalog, lets: Lets, scope: Scope) -> None:
        self.catalog = catalog
        self.lets = lets
        self.scope = scope
        self.found = Diagnostics()

    def resolve(self, tree: ast.ClauseTree, placed: PlacedStatement) -> Clause | None:
        """Return the clause, or None where something about it is wrong."""
        before = len(self.found) + len(self.scope.found)
        head = tree.kind.span | (tree.construct or tree.path or tree.kind).span
        parts = self._parts(tree)
        cls = self._construct(tree)
        if cls is None:
            return None
        spans = {part.word: (part.value.span if part.value else part.span) for part in tree.parts}
        self.found += on_problems(cls, "on" in spans, head, spans.get("on"))
        fields = FieldResolver(cls, head, self.lets, self.scope)
        construct = fields.resolve(tree, placed)
        self.found += fields.found
        if construct is None or len(self.found) + len(self.scope.found) > before:
            return None
        names = {"from": "start", "until": "stop"}
        given = {names.get(word, word): value for word, value in parts.items()}
        spans |= {"head": head} if tree.path is None else {"head": head, "path": tree.path.span}
        return Clause(construct, **given, origin=Origin(tree.span, fields.origin, spans))

    def _construct(self, tree: ast.ClauseTree) -> type[Construct] | None:
        kind, name = tree.kind.id, construct_name(tree, self.catalog)
        if name is None:
            assert tree.path is not None
            label = Label(tree.path.span, "expected the name of a construct first")
            takers = (n for k, n in self.catalog if k == kind and self._takes_path(k, n))
            path, taker = printable(tree.path.value), next(takers, None)
            help = f'write `{kind} {taker}("{path}")`' if taker else None
            edit = Edit(tree.path.span, f"{taker}({tree.path.span.text})") if taker else None
            message = f"`{kind}` is followed by a construct, not by a path"
            self.found.report("unknown-construct", message, label, help=help, edit=edit)
            return None
        cls = self.catalog.get((kind, name))
        if cls is not None:
            return cls
        d = unknown_construct(kind, printable(name), self.catalog)
        span = (tree.construct or tree.kind).span
        help, edit = d.help, None
        if kind in ("model", "data") and tree.construct and not tree.path:
            module, _, attribute = name.rpartition(".")
            path = f'"{module or "module"}:{attribute}"'
            help = f"write the import path in quotes: `{kind} {path}`"
            edit = Edit(span, path) if module else None
        notes = () if (kind, kind) in self.catalog else d.notes
        self.found.report(d.rule, d.message, Label(span), help=help, notes=notes, edit=edit)
        return None

    def _takes_path(self, kind: str, name: str) -> bool:
        return "path" in self.catalog[kind, name].model_fields

    def _parts(self, tree: ast.ClauseTree) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, ast.Part] = {}
        for part in tree.parts:
            if part.word in first:
                labels = repetition(part.span, first[part.word].span)
                self.found.report("duplicate-part", f"`{part.word}` is given twice", *labels)
                continue
            first[part.word] = part
            if part.word == "optional":
                out["optional"] = True
            elif part.word == "as":
                assert isinstance(part.value, ast.Ident)
                if "." in part.value.id:
                    label = Label(part.value.span, "expected a name without a dot")
                    message = f"the label `{part.value.id}` contains a dot"
                    self.found.report("reserved-name", message, label)
                out["label"] = part.value.id
            elif part.value is not None and not is_lost(part.value, self.lets, self.scope):
                try:
                    read = selector if part.word == "on" else duration
                    out[part.word] = read(self.lets.expand(part.value))
                except Unreadable as error:
                    wanted = "selector" if part.word == "on" else "duration"
                    message = f"`{part.word}` takes a {wanted}"
                    self.found.append(
                        unreadable_problem(error, part.value.span, message, self.lets)
                    )
        return out
