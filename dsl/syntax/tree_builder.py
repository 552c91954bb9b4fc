"""Rules of the grammar to nodes of the tree: one method per rule."""

from __future__ import annotations

import re
from typing import Any

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.lexer import Token
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.source import Source, Span

_ESCAPE = re.compile(r"\\(.)")
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}


class TreeBuilder:
    """Builds nodes for one source, and notes what the grammar cannot see."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Diagnostic] = []

    def build(self, rule: str, children: list[Any], start: int, end: int) -> Any:
        """Return the node of one rule."""
        return getattr(self, f"_{rule}")(children, Span(self.source, start, end))

    def _at(self, token: Token) -> Span:
        return Span(self.source, token.start, token.end)

    def _ident(self, token: Token) -> ast.Ident:
        return ast.Ident(token.text, span=self._at(token))

    def _str(self, token: Token) -> ast.Str:
        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPES:
                at = token.start + 1 + match.start()
                label = Label(
                    Span(self.source, at, at + 2), 'escapes are `\\"`, `\\\\`, `\\n`, `\\t`'
                )
                self.found.append(Diagnostic("syntax", f"`{match[0]}` is no escape", (label,)))
            return _ESCAPES.get(match[1], "")

        text = token.text[1:-1]
        return ast.Str(_ESCAPE.sub(unescape, text) if "\\" in text else text, span=self._at(token))

    def _num(self, token: Token) -> ast.Num:
        return ast.Num(token.text, span=self._at(token))

    # Statements

    def _start(self, children: list[Any], span: Span) -> ast.Tree:
        return ast.Tree(tuple(children), span=self.source.span())

    def _version(self, children: list[Any], span: Span) -> ast.Version:
        return ast.Version(self._num(children[0]), span=span)

    def _let(self, children: list[Any], span: Span) -> ast.Let:
        return ast.Let(children[0], children[1], span=span)

    def _use(self, children: list[Any], span: Span) -> ast.Use:
        return ast.Use(self._str(children[0]), span=span)

    def _clause(self, children: list[Any], span: Span) -> ast.ClauseTree:
        kind, (construct, path), *rest = children
        return self._finish(self._ident(kind), construct, path, rest, span)

    def _run(self, children: list[Any], span: Span) -> ast.ClauseTree:
        return self._finish(self._ident(children[0]), None, None, children[1:], span)

    def _finish(
        self,
        kind: ast.Ident,
        construct: ast.Ident | None,
        path: ast.Str | None,
        rest: list[Any],
        span: Span,
    ) -> ast.ClauseTree:
        fields = rest.pop() if rest and isinstance(rest[-1], tuple) else None
        parts = sorted(rest, key=lambda part: ast.PARTS.index(part.word))
        return ast.ClauseTree(kind, construct, path, tuple(parts), fields, span=span)

    def _target(self, children: list[Any], span: Span) -> tuple[ast.Ident, ast.Str | None]:
        name, *path = children
        return self._ident(name), self._str(path[0]) if path else None

    def _path_target(self, children: list[Any], span: Span) -> tuple[None, ast.Str]:
        return None, self._str(children[0])

    def _label(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("as", children[0], span=span)

    def _on(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("on", children[0], span=span)

    def _start_at(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("from", children[0], span=span)

    def _stop_at(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("until", children[0], span=span)

    def _every(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("every", children[0], span=span)

    def _optional(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("optional", None, span=span)

    def _fields(self, children: list[Any], span: Span) -> tuple[ast.Field, ...]:
        return tuple(children)

    def _field(self, children: list[Any], span: Span) -> ast.Field:
        return ast.Field(children[0], children[1], span=span)

    def _rule(self, children: list[Any], span: Span) -> ast.When:
        condition, *waits, actions = children
        given = {part.word: part.value for part in waits}
        return ast.When(condition, given.get("for"), actions, given.get("cooldown"), span=span)

    def _hold(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("for", children[0], span=span)

    def _cooldown(self, children: list[Any], span: Span) -> ast.Part:
        return ast.Part("cooldown", children[0], span=span)

    def _actions(self, children: list[Any], span: Span) -> tuple[ast.Action, ...]:
        return tuple(children)

    def _assign(self, children: list[Any], span: Span) -> ast.Action:
        return ast.Action(children[0], children[1], True, span=span)

    def _do(self, children: list[Any], span: Span) -> ast.Action:
        verb, *argument = children
        return ast.Action(verb, self._str(argument[0]) if argument else None, False, span=span)

    # Expressions

    def _name(self, children: list[Any], span: Span) -> ast.Ident:
        return self._ident(children[0])

    def _key(self, children: list[Any], span: Span) -> ast.Ident:
        first = children[0]
        return self._ident(first) if isinstance(first, Token) else first

    def _number(self, children: list[Any], span: Span) -> ast.Num:
        return self._num(children[0])

    def _quantity(self, children: list[Any], span: Span) -> ast.Measure:
        return ast.Measure(self._num(children[0]), children[1].text, span=span)

    def _percent(self, children: list[Any], span: Span) -> ast.Measure:
        return ast.Measure(self._num(children[0]), "%", span=span)

    def _string(self, children: list[Any], span: Span) -> ast.Str:
        return self._str(children[0])

    def _call(self, children: list[Any], span: Span) -> ast.Apply:
        return ast.Apply(children[0], children[1], span=span)

    def _items(self, children: list[Any], span: Span) -> ast.Items:
        for argument in children[0]:
            if argument.name:
                label = Label(argument.span, "lists hold values")
                self.found.append(Diagnostic("syntax", "a list has no named entries", (label,)))
        return ast.Items(tuple(argument.value for argument in children[0]), span=span)

    def _arguments(self, children: list[Any], span: Span) -> tuple[ast.Argument, ...]:
        return tuple(children)

    def _plain(self, children: list[Any], span: Span) -> ast.Argument:
        return ast.Argument(None, children[0], span=span)

    def _named(self, children: list[Any], span: Span) -> ast.Argument:
        return ast.Argument(children[0], children[1], span=span)

    def _group(self, children: list[Any], span: Span) -> Any:
        return children[0]

    def _unary(self, children: list[Any], span: Span) -> ast.Prefix:
        return ast.Prefix(children[0].text, children[1], span=span)

    def _binary(self, children: list[Any], span: Span) -> ast.Infix:
        return ast.Infix(children[1].text, children[0], children[2], span=span)

    def _is_state(self, children: list[Any], span: Span) -> ast.Infix:
        return ast.Infix("is", children[0], children[1], span=span)

    def _on_scope(self, children: list[Any], span: Span) -> ast.Infix:
        return ast.Infix("on", children[0], children[1], span=span)

    def _where(self, children: list[Any], span: Span) -> ast.Infix:
        return ast.Infix("where", children[0], children[1], span=span)

    def _expect(self, children: list[Any], span: Span) -> ast.Infix:
        return ast.Infix("expect", children[0], self._num(children[1]), span=span)

    def _interval(self, children: list[Any], span: Span) -> ast.Infix:
        return ast.Infix("..", children[0], children[2], span=span)
