"""Text to tokens by Lark's lexer, within bounds; characters that no token begins with are reported and skipped."""

from __future__ import annotations

import re

from lark import Token
from lark.exceptions import UnexpectedCharacters

from trainc.dsl.syntax.grammar import parser
from trainc.dsl.text.diagnostic import Diagnostic, Edit, Label
from trainc.dsl.text.source import Source, Span, printable

MAX_CHARACTERS = 250_000
MAX_TOKENS = 20_000
MAX_NESTING = 100
MAX_COMPLAINTS = 20
END = "$END"

OPENS = {"RBRACE": "LBRACE", "RPAR": "LPAR", "RSQB": "LSQB"}
"""What each closing bracket closes."""

# Where Lark's lexer stops: an open string and a bad number, which stand for a good one each, or anything else.
_BAD = re.compile(r'(?P<STRING>"[^\n]*)|(?P<NUMBER>\d[\w.]*)|[^\x00-\x7f]+|.', re.ASCII | re.DOTALL)


class Tokens:
    """The tokens of a text; `stopped` says that the rest of the text was not read."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.found: list[Diagnostic] = []
        self.stopped = False

    def stop(self, rule: str, message: str, span: Span, text: str = "") -> None:
        """Stop reading: keep only the diagnostic that says why."""
        self.tokens, self.stopped = [], True
        self.found = [Diagnostic(rule, message, (Label(span, text),))]


def tokenize(source: Source, begin: int = 0) -> Tokens:
    """Return the tokens of a text from `begin` on, or only a diagnostic where the text is too large."""
    out = Tokens()
    if len(source.text) > MAX_CHARACTERS:
        size = f"{len(source.text):,} characters; a spec has at most {MAX_CHARACTERS:,}"
        out.stop("too-large", "this text is too large to be a spec", source.span(0, 1), size)
        return out
    thread = parser().parse_interactive(source.text, start="start").lexer_thread
    assert thread.state is not None
    thread.state.line_ctr.feed(source.text[:begin])
    depth = 0
    while not out.stopped:
        try:
            for token in thread.lex(None):
                depth = _add(token, depth, out, source)
                if out.stopped:
                    break
            return _meant(out, source)
        except UnexpectedCharacters as error:
            from trainc.dsl.syntax.repairs import at_bad_character

            at = error.pos_in_stream or 0
            repair = at_bad_character(source, at, out.tokens)
            if repair is not None:
                thread.state.line_ctr.feed(source.text[at : repair.end])
                out.found.append(repair.found)
                del out.tokens[len(out.tokens) - repair.taken :]
                for token in repair.tokens:
                    depth = _add(token, depth, out, source)
                out.stopped = out.stopped or len(out.found) >= MAX_COMPLAINTS
                continue
            bad = _BAD.match(source.text, at)
            assert bad is not None
            thread.state.line_ctr.feed(bad[0])
            out.found.append(_complain(bad, source))
            if bad.lastgroup:  # the parser may go on as if it were right
                token = Token(bad.lastgroup, "0", bad.start(), end_pos=bad.end())
                depth = _add(token, depth, out, source)
            out.stopped = out.stopped or len(out.found) >= MAX_COMPLAINTS
    return out


def _meant(out: Tokens, source: Source) -> Tokens:
    """Return the tokens without the mistakes that are known by their form."""
    if not out.stopped:
        from trainc.dsl.syntax.token_repairs import repair_tokens

        out.tokens = _named(out.tokens)
        out.tokens, found = repair_tokens(out.tokens, source)
        out.found += found
    return out


def _named(tokens: list[Token]) -> list[Token]:
    """Return the tokens with a kind as a name where it is the construct of a clause, as in `loss model`.

    It stands behind another kind, and nothing follows that would name a construct of its own kind.
    """
    named: list[Token] = []
    for one, following in zip(tokens, [*tokens, None][1:], strict=True):
        behind_a_kind = bool(named) and named[-1].type == "KIND"
        if one.type == "KIND" and behind_a_kind and _names_no_other(following):
            one = Token("NAME", one.value, one.start_pos, end_pos=one.end_pos)
        named.append(one)
    return named


def _names_no_other(following: Token | None) -> bool:
    return following is None or following.type not in ("NAME", "STRING", "UNIT")


def comments_of(source: Source) -> list[Span]:
    """Return the comments of a text that has no bad characters."""
    tokens = parser().lex(source.text, dont_ignore=True)
    return [span_of(token, source) for token in tokens if token.type == "COMMENT"]


def span_of(token: Token, source: Source) -> Span:
    """Return where a token was read."""
    assert token.start_pos is not None
    assert token.end_pos is not None
    return Span(source, token.start_pos, token.end_pos)


def _add(token: Token, depth: int, out: Tokens, source: Source) -> int:
    """Add a token and return how many brackets are open after it."""
    out.tokens.append(token)
    if token.type in OPENS.values():
        depth += 1
    elif token.type in OPENS:
        depth = max(0, depth - 1)
    if depth > MAX_NESTING:
        message = f"brackets are nested more than {MAX_NESTING} levels deep"
        out.stop("too-deep", message, span_of(token, source))
    elif len(out.tokens) > MAX_TOKENS:
        size = f"a spec has at most {MAX_TOKENS:,} words and signs"
        message = "this text is too large to be a spec"
        out.stop("too-large", message, span_of(token, source), size)
    return depth


def _complain(bad: re.Match[str], source: Source) -> Diagnostic:
    """Return the diagnostic for characters that are not a token."""
    text = bad[0]
    span = Span(source, bad.start(), min(bad.end(), bad.start() + 80))
    if bad.lastgroup == "STRING":
        label = Label(span, 'expected a closing `"` on this line')
        return Diagnostic("syntax", "the string is never closed", (label,))
    if bad.lastgroup == "NUMBER":
        help = "write a space before a unit: `200 steps`; suffixes of numbers are `k`, `M`, `G` and `T`"
        message = f"`{printable(text)}` is not a number"
        return Diagnostic("syntax", message, (Label(span),), (), help)
    message = f"unexpected `{printable(text)}`"
    new = _REPLACED.get(text)
    edit = None if new is None else Edit(span, new, safe=text in _COMPARISONS)
    return Diagnostic("syntax", message, (Label(span),), (), _INSTEAD.get(text), edit=edit)


_COMPARISONS = {"≤": "<=", "≥": ">=", "≠": "!="}
_REPLACED = {";": ",", "!": "not ", "$": "", **_COMPARISONS}
_INSTEAD = {
    ";": "remove `;`; write `,` between fields",
    ":": "write `=` between a name and its value",
    "'": 'write strings with `"`',
    "!": "write `not`",
    **{sign: f"write `{word}`" for sign, word in _COMPARISONS.items()},
    "$": "write the name of a `let` without `$`: `width`",
}
