"""Lark's tree to the syntax tree: one method per rule of the grammar."""

from __future__ import annotations

import re
from typing import Any

from lark import Token
from lark.tree import Meta
from lark.visitors import Transformer_NonRecursive, v_args

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.tokens import span_of
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.source import Source, Span

_ESCAPE = re.compile(r"\\(.)")
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}


Target = tuple[ast.Ident | None, ast.Str | None]
Arguments = tuple[ast.Argument, ...]


@v_args(inline=True, meta=True)
class TreeBuilder(Transformer_NonRecursive[Token, Any]):
    """Builds the nodes of one source, and reports mistakes that the grammar does not exclude."""

    def __init__(self, source: Source) -> None:
        super().__init__(visit_tokens=False)
        self.source = source
        self.found: list[Diagnostic] = []

    def _at(self, meta: Meta) -> Span:
        return Span(self.source, meta.start_pos, meta.end_pos)

    def _ident(self, token: Token) -> ast.Ident:
        return ast.Ident(token.value, span=span_of(token, self.source))

    def string_of(self, token: Token) -> ast.Str:
        """Return the text of a string, and report unknown escapes."""
        span = span_of(token, self.source)

        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPES:
                at = 1 + match.start()
                label = Label(span.part(at, at + 2), 'escapes are `\\"`, `\\\\`, `\\n`, `\\t`')
                self.found.append(
                    Diagnostic("syntax", f"`{match[0]}` is not an escape sequence", (label,))
                )
            return _ESCAPES.get(match[1], "")

        return ast.Str(_ESCAPE.sub(unescape, token.value[1:-1]), span=span)

    def _num(self, token: Token) -> ast.Num:
        return ast.Num(token.value, span=span_of(token, self.source))

    # Statements

    def start(self, meta: Meta, *statements: ast.Statement) -> ast.Tree:
        return ast.Tree(statements, span=self.source.span())

    def version(self, meta: Meta, number: Token) -> ast.Version:
        return ast.Version(self._num(number), span=self._at(meta))

    def let(self, meta: Meta, name: ast.Ident, value: ast.Node) -> ast.Let:
        return ast.Let(name, value, span=self._at(meta))

    def use(self, meta: Meta, path: Token) -> ast.Use:
        return ast.Use(self.string_of(path), span=self._at(meta))

    def clause(self, meta: Meta, kind: Token, target: Target, *rest: Any) -> ast.ClauseTree:
        fields = rest[-1] if rest and isinstance(rest[-1], tuple) else None
        parts = rest if fields is None else rest[:-1]
        ordered = sorted(parts, key=lambda part: ast.PARTS.index(part.word))
        return ast.ClauseTree(
            self._ident(kind), *target, tuple(ordered), fields, span=self._at(meta)
        )

    def run(self, meta: Meta, kind: Token, *rest: Any) -> ast.ClauseTree:
        return self.clause(meta, kind, (None, None), *rest)

    def target(self, meta: Meta, name: Token, path: Token | None = None) -> Target:
        return self._ident(name), self.string_of(path) if path else None

    def path_target(self, meta: Meta, path: Token) -> Target:
        return None, self.string_of(path)

    def label(self, meta: Meta, name: ast.Ident) -> ast.Part:
        return ast.Part("as", name, span=self._at(meta))

    def on(self, meta: Meta, value: ast.Node) -> ast.Part:
        return ast.Part("on", value, span=self._at(meta))

    def start_at(self, meta: Meta, value: ast.Node) -> ast.Part:
        return ast.Part("from", value, span=self._at(meta))

    def stop_at(self, meta: Meta, value: ast.Node) -> ast.Part:
        return ast.Part("until", value, span=self._at(meta))

    def every(self, meta: Meta, value: ast.Node) -> ast.Part:
        return ast.Part("every", value, span=self._at(meta))

    def optional(self, meta: Meta) -> ast.Part:
        return ast.Part("optional", None, span=self._at(meta))

    def fields(self, meta: Meta, *fields: ast.Field) -> tuple[ast.Field, ...]:
        return fields

    def field(self, meta: Meta, name: ast.Ident, value: ast.Node) -> ast.Field:
        return ast.Field(name, value, span=self._at(meta))

    def nested(self, meta: Meta, name: ast.Ident, construct: ast.Ident, *rest: Any) -> ast.Field:
        *given, fields = rest
        arguments: Arguments = given[0] if given else ()
        path = arguments[0].value if len(arguments) == 1 and not arguments[0].name else None
        if given and not isinstance(path, ast.Str):
            end = fields[-1].span.end if fields else meta.end_pos
            label = Label(Span(self.source, construct.span.end, end), "expected a path in quotes")
            message = f"`{construct.id}` with fields in braces takes one path in brackets"
            self.found.append(Diagnostic("syntax", message, (label,)))
        span = Span(self.source, construct.span.start, meta.end_pos)
        found = path if isinstance(path, ast.Str) else None
        value = ast.Nested(construct, found, fields, span=span)
        return ast.Field(name, value, span=self._at(meta))

    def rule(self, meta: Meta, condition: ast.Node, *rest: Any) -> ast.When:
        *waits, actions = rest
        given = {part.word: part.value for part in waits}
        span = self._at(meta)
        return ast.When(condition, given.get("for"), actions, given.get("cooldown"), span=span)

    def hold(self, meta: Meta, value: ast.Node) -> ast.Part:
        return ast.Part("for", value, span=self._at(meta))

    def cooldown(self, meta: Meta, value: ast.Node) -> ast.Part:
        return ast.Part("cooldown", value, span=self._at(meta))

    def actions(self, meta: Meta, *actions: ast.Action) -> tuple[ast.Action, ...]:
        return actions

    def assign(self, meta: Meta, name: ast.Ident, value: ast.Node) -> ast.Action:
        return ast.Action(name, value, True, span=self._at(meta))

    def do(self, meta: Meta, verb: ast.Ident, argument: ast.Node | None = None) -> ast.Action:
        return ast.Action(verb, argument, False, span=self._at(meta))

    # Expressions

    def expression(self, meta: Meta, value: ast.Node) -> ast.Node:
        return value

    def name(self, meta: Meta, word: Token) -> ast.Ident:
        return self._ident(word)

    def key(self, meta: Meta, word: Token | ast.Ident) -> ast.Ident:
        return self._ident(word) if isinstance(word, Token) else word

    def number(self, meta: Meta, number: Token) -> ast.Num:
        return self._num(number)

    def quantity(self, meta: Meta, number: Token, unit: Token) -> ast.Measure:
        return ast.Measure(self._num(number), unit.value, span=self._at(meta))

    def percent(self, meta: Meta, number: Token) -> ast.Measure:
        return ast.Measure(self._num(number), "%", span=self._at(meta))

    def string(self, meta: Meta, text: Token) -> ast.Str:
        return self.string_of(text)

    def call(self, meta: Meta, name: ast.Ident, arguments: Arguments) -> ast.Apply:
        return ast.Apply(name, arguments, span=self._at(meta))

    def items(self, meta: Meta, arguments: Arguments) -> ast.Items:
        for argument in arguments:
            if argument.name:
                label = Label(argument.span, "write the value alone")
                self.found.append(Diagnostic("syntax", "an entry of a list has no name", (label,)))
        return ast.Items(tuple(argument.value for argument in arguments), span=self._at(meta))

    def arguments(self, meta: Meta, *arguments: ast.Argument) -> Arguments:
        return arguments

    def plain(self, meta: Meta, value: ast.Node) -> ast.Argument:
        return ast.Argument(None, value, span=self._at(meta))

    def named(self, meta: Meta, name: ast.Ident, value: ast.Node) -> ast.Argument:
        return ast.Argument(name, value, span=self._at(meta))

    def group(self, meta: Meta, value: ast.Node) -> ast.Node:
        return value

    def unary(self, meta: Meta, op: Token, operand: ast.Node) -> ast.Prefix:
        return ast.Prefix(op.value, operand, span=self._at(meta))

    def binary(self, meta: Meta, left: ast.Node, op: Token, right: ast.Node) -> ast.Infix:
        return ast.Infix(op.value, left, right, span=self._at(meta))

    def interval(self, meta: Meta, left: ast.Node, op: Token, right: ast.Node) -> ast.Infix:
        return ast.Infix(op.value, left, right, span=self._at(meta))

    def is_state(self, meta: Meta, left: ast.Node, right: ast.Node) -> ast.Infix:
        return ast.Infix("is", left, right, span=self._at(meta))

    def on_scope(self, meta: Meta, left: ast.Node, right: ast.Node) -> ast.Infix:
        return ast.Infix("on", left, right, span=self._at(meta))

    def where(self, meta: Meta, left: ast.Node, right: ast.Node) -> ast.Infix:
        return ast.Infix("where", left, right, span=self._at(meta))

    def expect(self, meta: Meta, left: ast.Node, number: Token) -> ast.Infix:
        return ast.Infix("expect", left, self._num(number), span=self._at(meta))
