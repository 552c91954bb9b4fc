"""Text to tree by Lark's parser, with every syntax error of the text and not only the first."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token, UnexpectedToken

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.grammar import EXPRESSION, START, Branch, Mismatch, TooDeep, parser
from trainc.dsl.syntax.repairs import foreign_format
from trainc.dsl.syntax.tokens import END, OPENS, span_of, tokenize
from trainc.dsl.syntax.tree_builder import TreeBuilder
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.source import Source

MAX_ERRORS = 100
"""Broken statements of one text that are explained: finding out what was expected takes time."""

_BEGINS = {
    "KIND": ("NAME", "STRING", "UNIT"),
    "RUN": ("LBRACE", "EVERY", "FROM", "UNTIL"),
    "LET": ("NAME", "KIND", "RUN", "UNIT"),
    "USE": ("STRING",),
    "TRAIN": ("NUMBER",),
    "WHEN": ("NAME", "KIND", "NOT", "LPAR", "RUN", "UNIT"),
}
"""What may follow the word that a statement begins with."""


class Parsed:
    """The tree of all complete statements, and diagnostics of the others.

    `lost` holds the names that broken statements would have defined, so that none is reported as unknown.
    """

    def __init__(self, source: Source, found: list[Diagnostic]) -> None:
        self.tree = ast.Tree((), span=source.span())
        self.found = found
        self.lost: set[str] = set()


def parse(source: Source) -> Parsed:
    """Return the tree of a text; a broken statement is left out of it and reported."""
    if (foreign := foreign_format(source)) is not None:
        out = Parsed(source, [foreign])
        out.lost.add("*")
        return out
    lexed = tokenize(source)
    out = Parsed(source, lexed.found)
    if lexed.stopped:
        return out
    builder = TreeBuilder(source)
    read = _parse_tokens(lexed.tokens)
    if isinstance(read, Branch):
        out.tree = builder.transform(read)
    else:
        _parse_statements(lexed.tokens, builder, out)
    out.found += builder.found
    out.found.sort(key=lambda d: d.span.start if d.span else 0)
    return out


def parse_expression(source: Source, begin: int = 0) -> tuple[ast.Node | None, list[Diagnostic]]:
    """Return the tree of a text that is one expression from its character `begin` on, or what is wrong with it."""
    lexed = tokenize(source, begin)
    if lexed.found:
        return None, lexed.found
    read = _parse_tokens(lexed.tokens, EXPRESSION, begin)
    if isinstance(read, Mismatch):
        from trainc.dsl.syntax.syntax_errors import explain

        before = lexed.tokens[: _index(read.token, lexed.tokens)]
        return None, [explain(read, before, source)]
    builder = TreeBuilder(source)
    node: ast.Node = builder.transform(read)
    return (None, builder.found) if builder.found else (node, [])


def _parse_tokens(tokens: Sequence[Token], start: str = START, begin: int = 0) -> Branch | Mismatch:
    """Return Lark's tree of the tokens, or the first token that does not fit; its exceptions stop here."""
    reading = parser().parse_interactive(start=start)
    end = tokens[-1].end_pos if tokens else begin
    try:
        for token in (*tokens, Token(END, "", end, end_pos=end)):
            tree = reading.feed_token(token)
    except UnexpectedToken:
        return Mismatch(token, reading)
    except TooDeep as error:
        return Mismatch(token, reading, too_deep=str(error))
    assert isinstance(tree, Branch)
    return tree


def _parse_statements(tokens: list[Token], builder: TreeBuilder, out: Parsed) -> None:
    """Read statement by statement, so that each can fail alone."""
    from trainc.dsl.syntax.syntax_errors import explain

    source = builder.source
    statements: list[ast.Statement] = []
    bad_characters = [d.span.start for d in out.found if d.span]
    starts = _statement_starts(tokens, source)
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        piece = tokens[begin:end]
        read = _parse_tokens(piece)
        if isinstance(read, Mismatch) and len(out.found) >= MAX_ERRORS:
            out.lost |= _names_defined(piece)
        elif isinstance(read, Mismatch):
            before = piece[: _index(read.token, piece)]
            whole: list[Token] = []
            if END in read.accepts:  # what came before is whole: keep it
                whole, piece, before = before, piece[len(before) :], []
                first = _parse_tokens(whole)
                assert isinstance(first, Branch)
                if _is_complete(whole, read.token, source):
                    statements += builder.transform(first).statements
                else:
                    out.lost |= _names_defined(whole)
            for token in before:
                if token.type == "STRING":
                    builder.string_of(token)
            # A bad character was left out, and what looks wrong beside the gap is no second mistake.
            if not _contains_any(bad_characters, piece, source):
                if read.token.type == END and end < len(tokens) and not read.too_deep:
                    read.token = tokens[end]
                out.found.append(explain(read, before, source, whole))
            out.lost |= _names_defined(piece)
        else:
            statements += builder.transform(read).statements
    out.tree = ast.Tree(tuple(statements), span=source.span())


def _is_complete(whole: Sequence[Token], following: Token, source: Source) -> bool:
    """Say whether a statement ends before a token that does not fit; a clause without braces goes on in its line."""
    if not whole or whole[0].type not in ("KIND", "RUN") or whole[-1].type == "RBRACE":
        return True
    between = source.text[whole[-1].end_pos : following.start_pos]
    return following.type == END or "\n" in between


def _contains_any(offsets: Sequence[int], piece: Sequence[Token], source: Source) -> bool:
    if not piece:
        return False
    span = span_of(piece[0], source) | span_of(piece[-1], source)
    return any(span.start <= at <= span.end for at in offsets)


def _statement_starts(tokens: list[Token], source: Source) -> list[int]:
    """Return the indices of tokens that seem to begin statements: first on a line, or outside all brackets."""
    starts, depth = [0], 0
    for n, token in enumerate(tokens):
        if token.type in OPENS.values():
            depth += 1
        elif token.type in OPENS:
            depth = max(0, depth - 1)
        if n == 0 or n + 1 == len(tokens) or token.type not in _BEGINS:
            continue
        before, after = tokens[n - 1], tokens[n + 1]
        if after.type not in _BEGINS[token.type]:
            continue
        new_line = "\n" in source.text[before.end_pos : token.start_pos]
        complete = before.type in ("RBRACE", "STRING") or (
            token.type in ("LET", "USE", "WHEN", "TRAIN") and depth == 0
        )
        if new_line or (depth == 0 and complete):
            starts.append(n)
            depth = 0
    return starts


def _names_defined(piece: Sequence[Token]) -> set[str]:
    """Return the names that a broken statement would have defined."""
    words = [token.value for token in piece[:8]]
    names = set(words[1:2])
    if "as" in words[:-1]:
        names.add(words[words.index("as") + 1])
    return names


def _index(token: Token, piece: Sequence[Token]) -> int:
    """Return the index of a token; the end of the text comes after all tokens."""
    return next((n for n, other in enumerate(piece) if other is token), len(piece))
