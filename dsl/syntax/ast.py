"""The syntax tree. Every node has the span it was read from, and none is interpreted yet.

Spans take no part in equality, so two texts that differ only in layout give equal trees.
"""

from __future__ import annotations

from trainc.dsl.text.record import Record, uncompared
from trainc.dsl.text.source import Source, Span

PARTS = ("as", "on", "from", "until", "every", "optional")  # their order means nothing
NOWHERE = Source("<python>", "").span()


class Spanned(Record):
    """Base of the nodes: the span it was read from."""

    span: Span = uncompared(default=NOWHERE, kw_only=True)


class Num(Spanned):
    """A number as it was written: `3e-4`, `1_000`, `2M`."""

    text: str


class Measure(Spanned):
    """A number with a unit, spelled as in the text: `step`, `steps`, `%`."""

    number: Num
    unit: str


class Str(Spanned):
    """A string; `value` is its text without quotes and escapes."""

    value: str


class Ident(Spanned):
    """A name, perhaps dotted; `true` and `false` are names here."""

    id: str


class Argument(Spanned):
    """One argument of a call; `name` is None for an argument without a name."""

    name: Ident | None
    value: Node


class Apply(Spanned):
    """A call."""

    function: Ident
    arguments: tuple[Argument, ...]


class Items(Spanned):
    """A list."""

    items: tuple[Node, ...]


class Prefix(Spanned):
    """`-x` or `not x`."""

    op: str
    operand: Node


class Infix(Spanned):
    """Two operands and an operator, `where`, `expect`, `on`, `is` and `..` among them."""

    op: str
    left: Node
    right: Node


class Nested(Spanned):
    """A construct with fields, as the value of a field: `adamw { lr = 1e-3 }`."""

    construct: Ident
    path: Str | None
    fields: tuple[Field, ...]


Node = Num | Measure | Str | Ident | Apply | Items | Prefix | Infix | Nested

# Statements ----------------------------------------------------------------------------------


class Version(Spanned):
    """`train 1`."""

    number: Num


class Let(Spanned):
    """`let name = value`."""

    name: Ident
    value: Node


class Use(Spanned):
    """`use "other.train"`."""

    path: Str


class Part(Spanned):
    """One of `as on from until every optional` and what follows it."""

    word: str
    value: Node | None


class Field(Spanned):
    """`name = value` inside a clause's braces."""

    name: Ident
    value: Node


class ClauseTree(Spanned):
    """A clause; `construct` is None where only a path is written, `fields` None without braces."""

    kind: Ident
    construct: Ident | None
    path: Str | None
    parts: tuple[Part, ...]
    fields: tuple[Field, ...] | None


class Action(Spanned):
    """`target = value`, or a verb that may have an argument: `warn "text"`, `close pace`, `freeze "blocks.*"`."""

    target: Ident
    value: Node | None
    assigns: bool


class When(Spanned):
    """`when condition for hold cooldown rest { actions }`."""

    condition: Node
    hold: Node | None
    actions: tuple[Action, ...]
    cooldown: Node | None = None


Statement = Version | Let | Use | ClauseTree | When


class Tree(Spanned):
    """A file."""

    statements: tuple[Statement, ...]


def nodes_of(statement: Statement) -> tuple[Node, ...]:
    """Return the values of a clause or a rule; none for other statements."""
    match statement:
        case ClauseTree():
            parts = tuple(part.value for part in statement.parts if part.value is not None)
            return (*parts, *(field.value for field in statement.fields or ()))
        case When():
            given = (statement.condition, statement.hold, statement.cooldown)
            return tuple(
                x for x in (*given, *(a.value for a in statement.actions)) if x is not None
            )
    return ()


def children(node: Node) -> tuple[Node, ...]:
    """Return the nodes directly inside a node."""
    match node:
        case Apply(_, arguments):
            return tuple(argument.value for argument in arguments)
        case Items(items):
            return items
        case Prefix(_, operand):
            return (operand,)
        case Infix(_, left, right):
            return (left, right)
        case Nested(fields=fields):
            return tuple(field.value for field in fields)
        case _:
            return ()
