"""Text to tokens. Comments are kept apart; what is no token is reported and skipped."""

from __future__ import annotations

import re
from typing import NamedTuple

from trainc.dsl.syntax.tables import LITERALS, TERMINALS
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.source import Source, Span, printable

MAX_CHARACTERS = 250_000
MAX_TOKENS = 20_000
MAX_NESTING = 100
END = "$END"

_REST = (r'(?P<UNCLOSED>"[^\n]*)', r"(?P<WORD>\d[\w.]*)", r"(?P<BAD>[^\x00-\x7f]+|.)")
_TOKEN = re.compile("|".join([*TERMINALS, *_REST]), re.ASCII | re.DOTALL)
_WORDS = {text: name for name, text in LITERALS.items() if text.isalpha()}
_CLOSES = {"}": "{", "]": "[", ")": "("}


class Token(NamedTuple):
    """A terminal of the grammar and the characters it was read from."""

    type: str
    text: str
    start: int
    end: int


class Tokens:
    """What a text consists of; `stopped` says that the rest was not looked at."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.comments: list[Token] = []
        self.found: list[Diagnostic] = []
        self.stopped = False


def tokenize(source: Source) -> Tokens:
    """Return the tokens of a text, or nothing but a diagnostic where it is beyond all bounds."""
    out = Tokens()
    if len(source.text) > MAX_CHARACTERS:
        size = f"{len(source.text):,} characters; a spec has at most {MAX_CHARACTERS:,}"
        _stop(out, "too-large", "this text is too large to be a spec", source.span(0, 1), size)
        return out
    depth = 0
    for match in _TOKEN.finditer(source.text):
        kind, text = str(match.lastgroup), match.group()
        if kind == "SPACE":
            continue
        token = Token(kind, text, match.start(), match.end())
        if kind == "COMMENT":
            out.comments.append(token)
            continue
        if kind in ("UNCLOSED", "WORD", "BAD"):
            out.found.append(_complain(token, source))
            if len(out.found) >= 20:
                out.stopped = True
                return out
            if kind == "BAD":
                continue
            token = Token("STRING" if kind == "UNCLOSED" else "NUMBER", "0", token.start, token.end)
        elif kind == "NAME" and text in _WORDS:
            token = Token(_WORDS[text], text, token.start, token.end)
        out.tokens.append(token)
        if text in _CLOSES.values():
            depth += 1
        elif text in _CLOSES:
            depth = max(0, depth - 1)
        if depth > MAX_NESTING:
            at = Span(source, token.start, token.end)
            _stop(out, "too-deep", f"brackets are nested more than {MAX_NESTING} deep", at)
            return out
        if len(out.tokens) > MAX_TOKENS:
            at = Span(source, token.start, token.end)
            size = f"this is word {MAX_TOKENS + 1:,}"
            _stop(out, "too-large", "this text is too large to be a spec", at, size)
            return out
    return out


def _stop(out: Tokens, rule: str, message: str, span: Span, text: str = "") -> None:
    """Give up: keep the one diagnostic that says why."""
    out.tokens, out.stopped = [], True
    out.found = [Diagnostic(rule, message, (Label(span, text),))]


def _complain(token: Token, source: Source) -> Diagnostic:
    """Explain a run of characters that is no token."""
    span = Span(source, token.start, min(token.end, token.start + 80))
    if token.type == "UNCLOSED":
        label = Label(span, 'expected a closing `"` on this line')
        return Diagnostic("syntax", "the string is never closed", (label,))
    if token.type == "WORD":
        help = "number suffixes are `k`, `M`, `G` and `T`; a unit stands apart: `200 steps`"
        return Diagnostic(
            "syntax", f"`{printable(token.text)}` is not a number", (Label(span),), (), help
        )
    hint = _INSTEAD.get(token.text)
    message = f"`{printable(token.text)}` means nothing here"
    return Diagnostic("syntax", message, (Label(span),), (), hint)


_INSTEAD = {
    ";": "statements and fields need no `;`: fields are separated by `,`",
    ":": "a value is given with `=`",
    "'": 'strings are written with `"`',
    "!": "write `not`",
    "$": "a `let` name stands for itself: write `width`, not `$width`",
}
