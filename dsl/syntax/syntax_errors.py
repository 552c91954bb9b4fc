"""Diagnostics of syntax errors: what was found, what was expected, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lark import Token

from trainc.dsl.syntax.grammar import Mismatch, parser
from trainc.dsl.syntax.tokens import END, OPENS, span_of
from trainc.dsl.text.diagnostic import Diagnostic, Edit, Label
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
_PARTS = {"AS", "ON", "FROM", "UNTIL", "EVERY", "OPTIONAL"}
_DOUBLED = {
    "&": "write `and` between conditions, `&` between selectors",
    "|": "write `or` between conditions, `|` between selectors",
    "*": "there is no operator for powers; in the pattern of a selector `**` matches any part of a name",
    "/": "comments begin with `#`",
    "=": "write one `=` to give a value, `==` to compare",
}
_WORDS = {"&": "and", "|": "or"}


def explain(
    mismatch: Mismatch, before: Sequence[Token], source: Source, whole: Sequence[Token] = ()
) -> Diagnostic:
    """Return the diagnostic for a token that cannot follow the tokens `before` it.

    `whole` is the complete statement before the token, if the token begins the next statement.
    """
    token, accepts = mismatch.token, mismatch.accepts
    if mismatch.too_deep:
        label = Label(span_of(token, source))
        return Diagnostic("too-deep", mismatch.too_deep, (label,))
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
    help, edit = _help(token, accepts, before, source, whole)
    if token.type == "STRING" and whole and whole[0].type == "KIND" and whole[-1].type == "NAME":
        help = f"an import path stands in brackets: write `{whole[-1]}({printable(token, 80)})`"
        edit = Edit(at, f"({token})", safe=len(whole) == 2)
    elif token.type in _PARTS and whole and whole[-1].type == "RBRACE":
        help = f"`{token}` and what follows it stand before the braces of the clause"
    return Diagnostic("syntax", message, tuple(labels), (), help, edit=edit)


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
    token: Token,
    accepts: frozenset[str],
    before: Sequence[Token],
    source: Source,
    whole: Sequence[Token],
) -> tuple[str | None, Edit | None]:
    """Return what to write instead, and the edit that does it; None where it is not known."""
    last = before[-1] if before else None
    span, text = span_of(token, source), token.value
    neighbours = (source.text[: span.start].rstrip()[-1:], source.text[span.end : span.end + 1])
    if text in _DOUBLED and text in neighbours:
        return _DOUBLED[text], _once(text, span, before)
    if text == "==" and "EQUAL" in accepts:
        return _DOUBLED["="], Edit(span, "=", safe=True)
    kind = _statement(before or whole, source)
    if token.type == "COMPARE" and kind == "WHEN":
        if sign := _selector_sign(before):
            return _DOUBLED[sign.value], Edit(span_of(sign, source), _WORDS[sign.value], safe=True)
        return "a condition compares two values: write `and` between two conditions", None
    if text == "=" and "AND" in accepts and kind in ("WHEN", "LET"):
        return "write `==` to compare", Edit(span, "==", safe=kind == "WHEN")
    if text == "=" and last and last.type in ("KIND", "RUN", "UNIT"):
        if (
            last.type != "UNIT"
            and not source.text[source.line_at(last.start_pos or 0)[0] : last.start_pos].strip()
        ):
            return "remove the `=`: a clause has none", Edit(span, "", safe=True)
        return (
            f"write the fields of a clause in braces: {_as_field(last, source, braces=True)}",
            None,
        )
    if token.type == "NAME" and "STRING" in accepts and last and last in ("use", "warn", "("):
        return _quoted(token, last, span)
    if token.type == "NUMBER" and last and last == "," and last.end_pos == span.start:
        return "write large numbers without commas: `1000`, or `1_000`", None
    after = Span(source, last.end_pos or 0, last.end_pos or 0) if last else span
    if accepts == {"EQUAL"} and last:
        value = token.type in ("NUMBER", "STRING", "NAME")
        safe = kind != "LET" or token.type != "NAME"  # the name of a `let` may have two words
        return f"write {_as_field(last, source)}", Edit(after, " =", safe=safe) if value else None
    statement = token.type in _STATEMENT and _begins_line(token, last, source)
    if "COMMA" in accepts and token.type in ("NAME", "UNIT", "KIND", "RUN") and not statement:
        return "write `,` between fields", Edit(after, ",", safe=True)
    return None, None


def _statement(tokens: Sequence[Token], source: Source) -> str | None:
    """Return the type of the token that begins the last of these statements."""
    for last, token in zip(reversed(tokens[:-1]), reversed(tokens), strict=False):
        if token.type in _STATEMENT and _begins_line(token, last, source):
            return token.type
    return tokens[0].type if tokens else None


def _selector_sign(before: Sequence[Token]) -> Token | None:
    """Return the `&` or `|` of selectors since the comparison before, where another comparison begins."""
    for token in reversed(before):
        if token.value in _WORDS:
            return token
        if token.type == "COMPARE":
            break
    return None


def _once(text: str, span: Span, before: Sequence[Token]) -> Edit | None:
    """Return the edit for a sign that is written twice."""
    start = span.start - 1 if span.source.text[span.start - 1 : span.start] == text else span.start
    both = Span(span.source, start, start + 2)
    words = _WORDS if _statement(before, span.source) == "WHEN" else {"&": "&", "|": "|"}
    new = {**words, "/": "#"}.get(text)
    return None if new is None else Edit(both, new, safe=True)


def _quoted(token: Token, last: Token, span: Span) -> tuple[str, Edit]:
    """Return how a path or a text without quotes is written."""
    written = f'"{token}"'
    if last == "(":
        module, _, name = token.value.rpartition(".")
        written = f'"{module}:{name}"' if module else written
    return f"write it in quotes: `{written}`", Edit(span, written, safe=last != "(")


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
