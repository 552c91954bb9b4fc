"""Turn statements into canonical text without comments; dsl/printing/formatter.py adds the comments."""

from __future__ import annotations

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node
from trainc.dsl.values.notation import (
    ATOM,
    BINDS,
    Written,
    bracketed,
    call,
    infix,
    listed,
    prefix,
    quoted,
)

WIDTH = 100
_INDENT = "    "


def format_node(node: Node, loosest: int = 0) -> str:
    """Return the text of an expression, in brackets where it binds looser than `loosest`."""
    return bracketed(_written(node), loosest)


def _written(node: Node) -> Written:
    match node:
        case ast.Num(text) | ast.Ident(text):
            return text, ATOM
        case ast.Measure(number, unit):
            return f"{number.text}{'' if unit == '%' else ' '}{unit}", ATOM
        case ast.Str(value):
            return quoted(value)
        case ast.Apply(function, arguments):
            given = ((a.name.id if a.name else None, _written(a.value)) for a in arguments)
            return call(function.id, given)
        case ast.Items(items):
            return listed(map(_written, items))
        case ast.Prefix(op, operand):
            return prefix(op, _written(operand))
        case ast.Infix(op, left, right):
            return infix(op, _written(left), _written(right))
    raise AssertionError(node)


def format_statement(statement: ast.Statement) -> str:
    """Return the text of a statement: one line if it fits, else a line per field."""
    match statement:
        case ast.Version(number):
            return f"train {number.text}"
        case ast.Let(name, value):
            return f"let {name.id} = {format_node(value)}"
        case ast.Use(path):
            return f"use {bracketed(quoted(path.value))}"
        case ast.When():
            return braced(format_when(statement), [*map(format_action, statement.actions)])
        case ast.ClauseTree(fields=fields):
            head = format_head(statement)
            return head if fields is None else braced(head, [*map(format_field, fields)])
    raise AssertionError(statement)


def format_when(rule: ast.When) -> str:
    """Return a rule up to its braces."""
    waits = (("for", rule.hold), ("cooldown", rule.cooldown))
    said = (f" {word} {format_node(wait, BINDS['+'])}" for word, wait in waits if wait)
    return f"when {format_node(rule.condition, BINDS['or'])}{''.join(said)}"


def format_head(clause: ast.ClauseTree) -> str:
    """Return a clause up to its braces, its parts in the order of the reference."""
    words = [clause.kind.id]
    if clause.construct:
        path = f"({bracketed(quoted(clause.path.value))})" if clause.path else ""
        words.append(clause.construct.id + path)
    elif clause.path:
        words.append(bracketed(quoted(clause.path.value)))
    words += map(_part, clause.parts)
    return " ".join(words)


def _part(part: ast.Part) -> str:
    if part.value is None:
        return part.word
    return f"{part.word} {format_node(part.value, BINDS['where' if part.word == 'on' else '+'])}"


def format_field(item: ast.Field) -> str:
    """Return the text of a field."""
    value = item.value
    if not isinstance(value, ast.Nested):
        return f"{item.name.id} = {format_node(value)}"
    path = f"({bracketed(quoted(value.path.value))})" if value.path else ""
    head = f"{item.name.id} = {value.construct.id}{path}"
    return braced(head, [*map(format_field, value.fields)])


def format_action(action: ast.Action) -> str:
    """Return the text of an action."""
    if action.value is None:
        return action.target.id
    return f"{action.target.id}{' =' if action.assigns else ''} {format_node(action.value)}"


def braced(head: str, items: list[str]) -> str:
    """Return a head with items in braces."""
    if not items:
        return f"{head} {{}}"
    line = f"{head} {{ {', '.join(items)} }}"
    if len(line) <= WIDTH and "\n" not in line:
        return line
    lines = (item.replace("\n", f"\n{_INDENT}") for item in items)
    return f"{head} {{\n{''.join(f'{_INDENT}{item},{chr(10)}' for item in lines)}}}"
