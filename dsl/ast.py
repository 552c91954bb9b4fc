"""The syntax tree. Every node knows the span it was read from; none carries meaning.

Spans take no part in equality, so two texts that differ only in layout give equal trees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainc.dsl.source import Source, Span

NOWHERE = Source("<python>", "").span()


def _span() -> Any:
    return field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Num:
    """A number as it was written: `3e-4`, `1_000`, `2M`."""

    text: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with a unit, which is as written: `step`, `steps`, `%`."""

    number: Num
    unit: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Str:
    """A string; `value` is what it stands for."""

    value: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Ident:
    """A name, perhaps dotted; `true` and `false` are names here."""

    id: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a call, `name` None when it stands without one."""

    name: Ident | None
    value: Node
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Apply:
    """A call."""

    function: Ident
    arguments: tuple[Argument, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Prefix:
    """`-x` or `not x`."""

    op: str
    operand: Node
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Infix:
    """Two operands and an operator, `where`, `expect`, `on`, `is` and `..` among them."""

    op: str
    left: Node
    right: Node
    span: Span = _span()


Node = Num | Measure | Str | Ident | Apply | Items | Prefix | Infix

# Statements ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Version:
    """`train 1`."""

    number: Num
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Let:
    """`let name = value`."""

    name: Ident
    value: Node
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Use:
    """`use "other.train"`."""

    path: Str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Part:
    """One of `as on from until every optional` and what follows it."""

    word: str
    value: Node | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Field:
    """`name = value` inside a clause's braces."""

    name: Ident
    value: Node
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class ClauseTree:
    """A clause; `construct` is None where only a path is written, `fields` None without braces."""

    kind: Ident
    construct: Ident | None
    path: Str | None
    parts: tuple[Part, ...]
    fields: tuple[Field, ...] | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Action:
    """`target = value` (verb None) or `verb "argument"`."""

    target: Ident
    value: Node | None
    assigns: bool
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class When:
    """`when condition for hold { actions }`."""

    condition: Node
    hold: Node | None
    actions: tuple[Action, ...]
    span: Span = _span()


Statement = Version | Let | Use | ClauseTree | When


@dataclass(frozen=True, slots=True)
class Tree:
    """A file."""

    statements: tuple[Statement, ...]
    span: Span = _span()


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
        case _:
            return ()
