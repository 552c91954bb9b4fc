"""Diagnostics of syntax errors: what was found, what was expected, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lark import Token

from trainc.dsl.syntax.grammar import MAX_DEPTH, Mismatch, parser
from trainc.dsl.syntax.tokens import END, OPENS, span_of
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.source import Source, Span, printable
from trainc.dsl.text.vocabulary import KINDS

_STATEMENT = {"LET", "USE", "WHEN", "KIND", "TRAIN"}
_OPERATORS = {
    "OR", "AND", "THEN", "COMPARE", "IS", "BAR", "AMP", "PLUS", "MINUS", "STAR", "SLASH", "DOTS",
    "WHERE", "EXPECT",
}  # fmt: skip
_KEYWORD_KEYS = {
    "AS", "ON", "FROM", "UNTIL", "EVERY", "OPTIONAL", "FOR", "THEN", "IS", "USE", "COOLDOWN",
}  # fmt: skip
_DOUBLED = {
    "&": "write `and` between conditions, `&` between selectors",
    "|": "write `or` between conditions, `|` between selectors",
    "*": "there is no operator for powers; in the pattern of a selector `**` matches any part of a name",
    "/": "comments begin with `#`",
    "=": "write one `=` to give a value, `==` to compare",
}


def explain(
    mismatch: Mismatch, before: Sequence[Token], source: Source, whole: Sequence[Token] = ()
) -> Diagnostic:
    """Return the diagnostic for a token that cannot follow the tokens `before` it.

    `whole` is the complete statement before the token, if the token begins the next statement.
    """
    token, accepts = mismatch.token, mismatch.accepts
    if mismatch.too_deep:
        label = Label(span_of(token, source))
        return Diagnostic("too-deep", f"this is nested more than {MAX_DEPTH} levels deep", (label,))
    last = before[-1] if before else None
    ended = token.type == END
    if not before and token.type == "NAME" and "KIND" in accepts:
        return _unknown_kind(token, source, whole)
    message = "the text ends too early" if ended else f"unexpected `{printable(token)}`"
    at = span_of(token, source)
    if ended:
        at = Span(source, max(0, at.start - 1), at.start)
    labels = [Label(at, f"expected {_listed(expected_words(accepts))}")]
    opened = _open_bracket(before)
    if opened and (ended or _begins_line(token, last, source)):
        labels.append(Label(span_of(opened, source), f"this `{opened}` is still open"))
    return Diagnostic("syntax", message, tuple(labels), (), _help(token, accepts, before, source))


def expected_words(accepts: frozenset[str]) -> list[str]:
    """Return the terminals in words; a group such as all that can begin a value has one name."""
    out = []
    rest = set(accepts)
    if rest >= _STATEMENT:
        rest -= _STATEMENT | {"RUN"}
        out.append("a statement")
    if {"NUMBER", "STRING", "LPAR", "NAME"} <= rest:
        rest -= {"NUMBER", "STRING", "NAME", "LPAR", "LSQB", "MINUS", "NOT", "KIND", "RUN", "UNIT"}
        out.append("a value")
        rest -= _KEYWORD_KEYS | {"WHERE", "EXPECT", "TRAIN"}
    elif "NAME" in rest:
        rest -= {"NAME", "KIND", "RUN", "UNIT", "TRAIN"} | _KEYWORD_KEYS | {"WHERE", "EXPECT"}
        out.append("a name")
    if {"PLUS", "STAR"} <= rest:
        rest -= _OPERATORS | {"PERCENT", "UNIT", "LPAR", "ON"}
        if not rest:
            out.append("an operator")
    if "LBRACE" in rest and {"ON", "EVERY"} & rest:
        rest -= {"AS", "ON", "FROM", "UNTIL", "EVERY", "OPTIONAL"}
    if out:
        rest.discard(END)
    return out + sorted(map(_in_words, rest))


def _in_words(terminal: str) -> str:
    """Return one terminal in words."""
    words = {"NUMBER": "a number", "STRING": "a string", "UNIT": "a unit", END: "the end"}
    if terminal in words:
        return words[terminal]
    pattern = parser().get_terminal(terminal).pattern
    return f"`{pattern.value if pattern.type == 'str' else terminal.lower()}`"


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _open_bracket(before: Sequence[Token]) -> Token | None:
    """Return the innermost bracket that is not closed yet."""
    stack: list[Token] = []
    for token in before:
        if token.type in OPENS.values():
            stack.append(token)
        elif stack and OPENS.get(token.type) == stack[-1].type:
            stack.pop()
    return stack[-1] if stack else None


def _begins_line(token: Token, last: Token | None, source: Source) -> bool:
    return last is not None and "\n" in source.text[last.end_pos : token.start_pos]


def _help(
    token: Token, accepts: frozenset[str], before: Sequence[Token], source: Source
) -> str | None:
    last = before[-1] if before else None
    span, text = span_of(token, source), token.value
    neighbours = (source.text[: span.start].rstrip()[-1:], source.text[span.end : span.end + 1])
    if text in _DOUBLED and text in neighbours:
        return _DOUBLED[text]
    if text == "==" and "EQUAL" in accepts:
        return _DOUBLED["="]
    if text == "=" and "AND" in accepts:
        return "write `==` to compare"
    if accepts == {"EQUAL"} and last:
        return f"write {_as_field(last, source)}"
    statement = token.type in _STATEMENT and _begins_line(token, last, source)
    if "COMMA" in accepts and token.type in ("NAME", "UNIT", "KIND", "RUN") and not statement:
        return "write `,` between fields"
    return None


def _unknown_kind(token: Token, source: Source, whole: Sequence[Token]) -> Diagnostic:
    label = Label(span_of(token, source))
    kinds = f"kinds are {', '.join(f'`{kind}`' for kind in KINDS)}"
    words = [*KINDS, "let", "use", "when", "train"]
    name = printable(token)
    help = suggest(token, words)
    clause = bool(whole) and whole[0].type in ("KIND", "RUN")
    if help is None and clause and not _begins_line(token, whole[-1], source):
        field = _as_field(token, source, braces=True)
        help = f"write the fields of a clause in braces: {field}"
    return Diagnostic("unknown-kind", f"there is no kind `{name}`", (label,), (kinds,), help)


_VALUE = re.compile(r"\s*(?:(?:as|every|for|from|on|until)\b|=)?\s*([^,{}#\n]*)")


def _as_field(name: Token, source: Source, *, braces: bool = False) -> str:
    """Return a name and what follows it on its line as a field, in backticks."""
    found = _VALUE.match(source.text, span_of(name, source).end)
    value = printable(found[1].strip(), 40) if found else ""
    field = f"{printable(name)} = {value or '...'}"
    return f"`{{ {field} }}`" if braces else f"`{field}`"
