"""Clauses written as the value of a field, `others = adamw { ... }`: each becomes a clause of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainc.dsl.reading.construct import Catalog
from trainc.dsl.reading.field_types import node_of
from trainc.dsl.resolve.clause import construct_name
from trainc.dsl.resolve.includes import PlacedStatement
from trainc.dsl.syntax import ast
from trainc.dsl.text.diagnostic import Diagnostics, Label
from trainc.dsl.text.source import Span


class UnnestedClauses:
    """Statements with every nested clause behind the one that holds it, on what that one does not select."""

    def __init__(self, placed: Iterable[PlacedStatement], catalog: Catalog) -> None:
        self.catalog = catalog
        self.found = Diagnostics()
        self.statements = [each for item in placed for each in self._unnested(item)]

    def _unnested(self, item: PlacedStatement) -> Iterator[PlacedStatement]:
        tree = item.statement
        if not isinstance(tree, ast.ClauseTree) or tree.fields is None:
            yield item
            return
        nested = [field for field in tree.fields if isinstance(field.value, ast.Nested)]
        if not nested:
            yield item
            return
        plain = tuple(field for field in tree.fields if field not in nested)
        yield item.replace(statement=tree.replace(fields=plain))
        for n, field in enumerate(nested):
            value = field.value
            assert isinstance(value, ast.Nested)
            if self._takes(tree, field, again=any(f.name.id == field.name.id for f in nested[:n])):
                yield from self._unnested(item.replace(statement=self._clause(tree, value)))

    def _takes(self, tree: ast.ClauseTree, field: ast.Field, *, again: bool) -> bool:
        """Say whether a clause's construct takes a clause in a field, and report where it does not."""
        cls = self.catalog.get((tree.kind.id, construct_name(tree, self.catalog) or ""))
        if cls is None:  # which is reported where the clause is resolved
            return False
        name, label = field.name.id, Label(field.value.span)
        if cls.nests != name:
            known = name in cls.model_fields
            message = f"`{cls.heading()}` takes no clause in `{name}`"
            help = f"write a value: `{name} = ...`" if known else "write it as a clause of its own"
            self.found.report("bad-value", message, label, help=help)
        elif again:
            self.found.report("duplicate-field", f"`{name}` is given twice", label)
        return cls.nests == name and not again

    def _clause(self, tree: ast.ClauseTree, value: ast.Nested) -> ast.ClauseTree:
        """Return a nested clause as one of its own, of the same kind, on the rest of what trains."""
        cls = self.catalog[tree.kind.id, construct_name(tree, self.catalog) or ""]
        at = value.construct.span
        selected = next((part.value for part in tree.parts if part.word == "on"), None)
        selected = selected or node_of(cls.default_on or "all")
        rest = ast.Infix("-", ast.Ident("trainable", span=at), _placed(selected, at), span=at)
        parts = [ast.Part("on", rest, span=at)]
        parts += [part for part in tree.parts if part.word == "optional"]
        kind = tree.kind.replace(span=at)
        return ast.ClauseTree(
            kind, value.construct, value.path, tuple(parts), value.fields, span=value.span
        )


def _placed(node: ast.Node, span: Span) -> ast.Node:
    """Return a selector with its place, without the number that is expected of it."""
    if isinstance(node, ast.Infix) and node.op == "expect":
        return _placed(node.left, span)
    return node.replace(span=span)
