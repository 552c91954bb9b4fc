"""Text to tree, with every syntax error of the text and not only the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.lexer import END, Token, tokenize
from trainc.dsl.syntax.machine import MAX_DEPTH, Refused, run
from trainc.dsl.syntax.syntax_errors import explain
from trainc.dsl.syntax.tree_builder import TreeBuilder
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.source import Source, Span

_BEGINS = {
    "KIND": ("NAME", "STRING", "UNIT"),
    "RUN": ("LBRACE", "EVERY", "FROM", "UNTIL"),
    "LET": ("NAME", "KIND", "RUN", "UNIT"),
    "USE": ("STRING",),
    "TRAIN": ("NUMBER",),
    "WHEN": ("NAME", "KIND", "NOT", "LPAR", "RUN", "UNIT"),
}


class Parsed:
    """A tree of what could be read, its comments, and what could not.

    `lost` holds the names that broken statements would have defined: nobody should be told that
    they are unknown.
    """

    def __init__(self, tree: ast.Tree, comments: list[Token], found: list[Diagnostic]) -> None:
        self.tree = tree
        self.comments = comments
        self.found = found
        self.lost: set[str] = set()


def parse(source: Source) -> Parsed:
    """Return the tree of a text; a broken statement is left out of it and reported."""
    lexed = tokenize(source)
    out = Parsed(ast.Tree((), span=source.span()), lexed.comments, lexed.found)
    if lexed.stopped:
        return out
    builder = TreeBuilder(source)
    try:
        out.tree = run(lexed.tokens, builder)
    except Refused:
        builder = TreeBuilder(source)
        _piecewise(lexed.tokens, builder, out)
    out.found += builder.found
    out.found.sort(key=lambda d: d.span.start if d.span else 0)
    return out


def parse_expression(source: Source, skip: int = 0) -> tuple[ast.Node | None, list[Diagnostic]]:
    """Return the tree of a text that is one expression, from its character `skip` on."""
    opening = "let value =\n"
    shifted = Source(source.name, opening + source.text[skip:])
    parsed = parse(shifted)
    offset = len(opening) - skip
    found = [_moved(d, source, offset) for d in parsed.found]
    match parsed.tree.statements:
        case [ast.Let(_, value)] if not found:
            return _relocated(value, source, offset), []
        case _ if found:
            return None, found
        case statements:
            span = statements[1].span if len(statements) > 1 else shifted.span(offset)
            label = Label(span, "expected one value")
            extra = Diagnostic("syntax", "there is more than one value here", (label,))
            return None, [_moved(extra, source, offset)]


def _piecewise(tokens: list[Token], builder: TreeBuilder, out: Parsed) -> None:
    """Read statement by statement, so that each can fail alone."""
    statements: list[ast.Statement] = []
    garbled = [d.span.start for d in out.found if d.span]
    cuts = _cuts(tokens, builder.source)
    for begin, end in zip(cuts, [*cuts[1:], len(tokens)], strict=True):
        piece = tokens[begin:end]
        following = tokens[end] if end < len(tokens) else None
        try:
            statements += run(piece, builder).statements
        except Refused as refusal:
            index = _index(refusal.token, piece)
            whole: list[Token] = []
            if END in refusal.accepts:  # what came before is whole: keep it
                whole = piece[:index]
                statements += run(whole, builder).statements
                piece = piece[index:]
                index = 0
            # A character that means nothing leaves a gap, which is no second mistake.
            if not _among(garbled, piece):
                source = builder.source
                out.found.append(_diagnose(refusal, piece[:index], following, source, whole))
            out.lost |= _defined(piece)
    out.tree = ast.Tree(tuple(statements), span=builder.source.span())


def _among(offsets: Sequence[int], piece: Sequence[Token]) -> bool:
    return bool(piece) and any(piece[0].start <= at <= piece[-1].end for at in offsets)


def _cuts(tokens: list[Token], source: Source) -> list[int]:
    """Return where statements seem to begin: first on a line, or outside all brackets."""
    cuts, depth = [0], 0
    for n, token in enumerate(tokens):
        if token.type in ("LBRACE", "LPAR", "LSQB"):
            depth += 1
        elif token.type in ("RBRACE", "RPAR", "RSQB"):
            depth = max(0, depth - 1)
        if n == 0 or n + 1 == len(tokens) or token.type not in _BEGINS:
            continue
        before, after = tokens[n - 1], tokens[n + 1]
        if after.type not in _BEGINS[token.type]:
            continue
        new_line = "\n" in source.text[before.end : token.start]
        complete = before.type in ("RBRACE", "STRING") or (
            token.type in ("LET", "USE", "WHEN", "TRAIN") and depth == 0
        )
        if new_line or (depth == 0 and complete):
            cuts.append(n)
            depth = 0
    return cuts


def _defined(piece: Sequence[Token]) -> set[str]:
    """Return the names a broken statement was about to define."""
    words = [token.text for token in piece[:8]]
    names = set(words[1:2])
    if "as" in words[:-1]:
        names.add(words[words.index("as") + 1])
    return names


def _diagnose(
    refusal: Refused,
    before: Sequence[Token],
    following: Token | None,
    source: Source,
    whole: Sequence[Token],
) -> Diagnostic:
    token = refusal.token
    if refusal.too_deep:
        label = Label(Span(source, token.start, token.end or token.start))
        return Diagnostic("too-deep", f"this is nested more than {MAX_DEPTH} deep", (label,))
    if token.type == END and following:
        token = following
    return explain(token, refusal.accepts, before, source, whole)


def _index(token: Token, piece: Sequence[Token]) -> int:
    """Return where a token stands; the end of the text stands after all others."""
    return next((n for n, other in enumerate(piece) if other is token), len(piece))


def _moved(d: Diagnostic, source: Source, offset: int) -> Diagnostic:
    labels = tuple(Label(_shift(x.span, source, offset), x.text) for x in d.labels)
    return Diagnostic(d.rule, d.message, labels, d.notes, d.help, d.severity)


def _shift(span: Span, source: Source, offset: int) -> Span:
    size = len(source.text)
    start = min(max(0, span.start - offset), size)
    return Span(source, start, min(max(start, span.end - offset), size))


def _relocated(node: Any, source: Source, offset: int) -> Any:
    """Return the node with spans in `source`, where it begins `offset` characters earlier."""
    changes: dict[str, Any] = {}
    for name in (*node.__match_args__, "span"):
        value = getattr(node, name)
        if isinstance(value, Span):
            changes[name] = _shift(value, source, offset)
        elif isinstance(value, tuple):
            changes[name] = tuple(_relocated(x, source, offset) for x in value)
        elif hasattr(value, "span"):
            changes[name] = _relocated(value, source, offset)
    return node.replace(**changes)
