"""Every construct of the catalog as clauses for any architecture: its own example, and its example on other parts."""

from collections.abc import Iterator
from typing import Any

import trainc
from trainc.dsl.printing.canonical import format_statement
from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.fields import field_type
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.parser import parse, parse_expression
from trainc.dsl.text.source import Source

BATCH = 4
"""The examples of a step."""
SMALL = 2
"""What whole numbers are in the clauses, such as ranks and sizes of groups: no layer of the zoo is too small for it.

A field that has to be larger has the least that it may be.
"""
SELECTIONS = {
    "modules": (
        "role(norm)",
        "role(mlp) & type(Linear)",
        "type(Linear) - role(head)",
        "type(_ConvNd)",
        "all",
    ),
    "parameters": ("matrices", "ndim(1) | role(embedding)", "trainable"),
    "none": (),
}
"""What a clause of each kind of target is put on besides what its example selects."""


def clauses(construct: type[Construct]) -> Iterator[tuple[str, str]]:
    """Yield `(what it selects, clause)`: the example's own selection first, which is `example`."""
    tree = _acting_at_once(construct, _example(construct))
    yield "example", format_statement(tree)
    for selector in SELECTIONS[construct.targets]:
        yield selector, format_statement(_with_part(tree, "on", selector))


def without_effect(construct: type[Construct]) -> Iterator[str]:
    """Yield its clause with each field value that makes it do nothing, on what it selects by itself."""
    tree = _acting_at_once(construct, _example(construct))
    if construct.targets == "modules":
        tree = _with_part(tree, "on", "type(Linear)")
    elif construct.targets == "parameters":
        tree = _with_part(tree, "on", "matrices")
    for name, value in construct.identity.items():
        kept = [field for field in tree.fields or () if field.name.id != name]
        fields = (*kept, ast.Field(ast.Ident(name), _node(value)))
        yield format_statement(tree.replace(fields=fields))


def _example(construct: type[Construct]) -> ast.ClauseTree:
    trees = parse(Source("example", construct.usage)).tree.statements
    (tree,) = [t for t in trees if isinstance(t, ast.ClauseTree)]
    return tree


def _acting_at_once(construct: type[Construct], tree: ast.ClauseTree) -> ast.ClauseTree:
    """Return a clause that acts in every step, with numbers that a batch of the zoo has room for.

    Where these do not fit together, it has those of the example.
    """
    tree = tree.replace(parts=tuple(part for part in tree.parts if part.word != "from"))
    if any(part.word == "every" for part in tree.parts):
        tree = _with_part(tree, "every", "1 steps")
    written = {field.name.id: field for field in tree.fields or ()}
    fields = written | {
        name: ast.Field(ast.Ident(name), _node(value))
        for name, info in construct.model_fields.items()
        if (value := _small(info, name in written)) is not None
    }
    small = tree.replace(fields=tuple(fields.values())) if fields else tree
    return small if trainc.check(format_statement(small)).spec is not None else tree


def _small(info: Any, written: bool) -> str | None:
    """Return the value a field has in the zoo; None where it keeps the example's, or its default."""
    own = field_type(info)
    if own is not None and own.period and written:
        return "1 steps"
    large = isinstance(info.default, int) and info.default > SMALL
    least = max((getattr(limit, "ge", SMALL) for limit in info.metadata), default=SMALL)
    return str(max(SMALL, least)) if info.annotation is int and (written or large) else None


def _with_part(tree: ast.ClauseTree, word: str, value: str) -> ast.ClauseTree:
    kept = [part for part in tree.parts if part.word != word]
    return tree.replace(parts=(*kept, ast.Part(word, _node(value))))


def _node(text: str) -> ast.Node:
    node, _ = parse_expression(Source("value", text))
    assert node is not None, text
    return node
