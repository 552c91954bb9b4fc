"""Trees and values to canonical text, without comments; dsl/printing/formatter.py puts those back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node

WIDTH = 100
_INDENT = "    "
# How tightly each operator binds, as in train.lark; loosest first.
_LEVELS = (
    ("on",), ("where", "expect"), ("or",), ("and",), ("not",),
    ("<", ">", "<=", ">=", "==", "!=", "is"), ("then",), ("|",), ("&",), ("+", "-"), ("*", "/"),
    ("..",), ("neg",),
)  # fmt: skip
_BINDS = {op: level for level, ops in enumerate(_LEVELS) for op in ops}
_ATOM = len(_LEVELS)
_CHAINS = {"or", "and", "then", "|", "&", "+", "-", "*", "/", "where", "expect"}


def format_node(node: Node, loosest: int = 0) -> str:
    """Return the text of an expression, in brackets where it binds looser than `loosest`."""
    text, binds = _node(node)
    return text if binds >= loosest else f"({text})"


def _node(node: Node) -> tuple[str, int]:
    match node:
        case ast.Num(text):
            return text, _ATOM
        case ast.Measure(number, "%"):
            return f"{number.text}%", _ATOM
        case ast.Measure(number, unit):
            return f"{number.text} {unit}", _ATOM
        case ast.Str(value):
            return quote(value), _ATOM
        case ast.Ident(name):
            return name, _ATOM
        case ast.Apply(function, arguments):
            return f"{function.id}({', '.join(map(_argument, arguments))})", _ATOM
        case ast.Items(items):
            return f"[{', '.join(map(format_node, items))}]", _ATOM
        case ast.Prefix("-", operand):
            return f"-{format_node(operand, _BINDS['neg'])}", _BINDS["neg"]
        case ast.Prefix(op, operand):
            return f"{op} {format_node(operand, _BINDS['not'] + 1)}", _BINDS["not"]
        case ast.Infix("..", left, right):
            level = _BINDS[".."] + 1
            return f"{format_node(left, level)}..{format_node(right, level)}", _BINDS[".."]
        case ast.Infix(op, left, right):
            level = _BINDS[op]
            first = format_node(left, level if op in _CHAINS else level + 1)
            return f"{first} {op} {format_node(right, level + 1)}", level
    raise AssertionError(node)


def _argument(argument: ast.Argument) -> str:
    value = format_node(argument.value)
    return f"{argument.name.id} = {value}" if argument.name else value


def quote(text: str) -> str:
    """Return text as a string of the language."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"'


def format_value(value: Any) -> str:
    """Return the text of a value of the language."""
    from trainc.dsl.printing.value_tree import to_node

    return format_node(to_node(value))


def format_statement(statement: ast.Statement) -> str:
    """Return the text of a statement: one line if it fits, else a line per field."""
    match statement:
        case ast.Version(number):
            return f"train {number.text}"
        case ast.Let(name, value):
            return f"let {name.id} = {format_node(value)}"
        case ast.Use(path):
            return f"use {quote(path.value)}"
        case ast.When():
            return braced(format_when(statement), [*map(format_action, statement.actions)])
        case ast.ClauseTree(fields=fields):
            head = format_head(statement)
            return head if fields is None else braced(head, [*map(format_field, fields)])
    raise AssertionError(statement)


def format_when(rule: ast.When) -> str:
    """Return a rule up to its braces."""
    waits = (("for", rule.hold), ("cooldown", rule.cooldown))
    said = (f" {word} {format_node(wait, _BINDS['+'])}" for word, wait in waits if wait)
    return f"when {format_node(rule.condition, _BINDS['or'])}{''.join(said)}"


def format_head(clause: ast.ClauseTree) -> str:
    """Return a clause up to its braces, its parts in the order of the reference."""
    words = [clause.kind.id]
    if clause.construct:
        path = f"({quote(clause.path.value)})" if clause.path else ""
        words.append(clause.construct.id + path)
    elif clause.path:
        words.append(quote(clause.path.value))
    words += map(_part, clause.parts)
    return " ".join(words)


def _part(part: ast.Part) -> str:
    if part.value is None:
        return part.word
    return f"{part.word} {format_node(part.value, _BINDS['where' if part.word == 'on' else '+'])}"


def format_field(item: ast.Field) -> str:
    """Return the text of a field."""
    return f"{item.name.id} = {format_node(item.value)}"


def format_action(action: ast.Action) -> str:
    """Return the text of an action."""
    if action.value is None:
        return action.target.id
    return f"{action.target.id}{' =' if action.assigns else ''} {format_node(action.value)}"


def braced(head: str, items: list[str], split: bool = False) -> str:
    """Return a head with items in braces."""
    if not items:
        return f"{head} {{}}"
    line = f"{head} {{ {', '.join(items)} }}"
    if len(line) <= WIDTH and not split:
        return line
    return f"{head} {{\n{''.join(f'{_INDENT}{item},{chr(10)}' for item in items)}}}"


def format_tree(tree: ast.Tree) -> str:
    """Return the canonical text of a file that has no comments."""
    return "".join(_lines(tree))


def _lines(tree: ast.Tree) -> Iterator[str]:
    for statement in tree.statements:
        yield f"{format_statement(statement)}\n"
