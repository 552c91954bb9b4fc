"""Mistakes of spelling that are known by their form: each is reported once, and the text is read as it was meant.

They are found in the characters that no token begins with; token_repairs.py finds more in the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lark import Token

from trainc.dsl.text.diagnostic import Diagnostic, Edit, Label
from trainc.dsl.text.nearest import nearest
from trainc.dsl.text.source import Source, Span, printable
from trainc.dsl.text.vocabulary import UNITS

_SYNONYMS = {
    "it": "steps", "iter": "steps", "iters": "steps", "iteration": "steps", "iterations": "steps",
    "update": "steps", "updates": "steps", "batches": "steps", "examples": "samples",
    "images": "samples", "rows": "samples", "ep": "epochs", "passes": "epochs", "s": "seconds",
    "sec": "seconds", "secs": "seconds", "min": "minutes", "mins": "minutes", "h": "hours",
    "hr": "hours", "hrs": "hours", "percent": "%", "pct": "%",
}  # fmt: skip
KNOWN_UNITS = f"units are {', '.join(f'`{u}`' for u in UNITS)}, and `%` of the run"

_SINGLE, _DOUBLE = "'`\u2018\u2019\u201a", "\u201c\u201d\u201e\u00ab\u00bb"
_QUOTED = re.compile(
    rf"[{_SINGLE}]((?:[^{_SINGLE}\n]|(?<=\w)[{_SINGLE}](?=\w))*)[{_SINGLE}](?!\w)"
    rf"|[{_DOUBLE}]([^{_DOUBLE}\"\n]*)[{_DOUBLE}\"]"
    rf"|\"([^\"{_DOUBLE}\n]*)[{_DOUBLE}]"
)
_OPEN = re.compile(rf"[\"{_SINGLE}{_DOUBLE}]([\w.:*?/-]+)(?![^\n]*\")")
_PATH = re.compile(r":[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[\"']?")
_GLOB = re.compile(r"[\w*?]+(\.[\w*?]+)+")
_GLUED = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)([A-Za-z]+)(?![\w.])")
_YAML = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*(?:---|[ \t]*- |[ \t]*[\w.-]+:(?:\s|$))")
WORDS = {"NAME", "KIND", "RUN", "UNIT"}


class Repair:
    """Tokens in the place of a text up to `end`, which take over the last `taken` tokens, and what is said of them."""

    def __init__(
        self, found: Diagnostic, end: int, tokens: Sequence[Token] = (), taken: int = 0
    ) -> None:
        self.found, self.end, self.tokens, self.taken = found, end, tokens, taken


def foreign_format(source: Source) -> Diagnostic | None:
    """Return the only diagnostic for a text that is JSON, TOML or YAML; None for any other."""
    start = len(source.text) - len(source.text.lstrip())
    first = source.text[start : start + 1]
    name = None
    if first and first in "{[":
        name = "TOML" if re.match(r"\[[\w.]+\]\s*$", source.text[start:], re.MULTILINE) else "JSON"
    elif _YAML.match(source.text):
        name = "YAML"
    if name is None:
        return None
    label = Label(Span(source, start, start + 1), "a spec begins with a statement")
    help = 'write clauses: `model "module:callable" { width = 48 }`, `run { length = 2000 steps }`'
    return Diagnostic("syntax", f"this text is {name}, not a spec", (label,), (), help)


def at_bad_character(source: Source, at: int, tokens: Sequence[Token]) -> Repair | None:
    """Return what is meant by the text around a character that no token begins with; None where that is not known."""
    text = source.text
    if (quoted := _QUOTED.match(text, at)) is not None:
        inner = next(group for group in quoted.groups() if group is not None)
        return _as_string(source, at, quoted.end(), inner, 'strings are written in `"`')
    if (opened := _OPEN.match(text, at)) is not None and re.search(r"[:.*]", opened[1]):
        span = Span(source, at, opened.end())
        label = Label(span, 'expected a closing `"` on this line')
        found = Diagnostic(
            "syntax",
            "the string is never closed",
            (label,),
            (),
            f'write `"{opened[1]}"`',
            edit=Edit(span, f'"{opened[1]}"'),
        )
        return Repair(found, span.end, [new_token("STRING", f'"{opened[1]}"', span)])
    if text[at] == ":":
        return _at_colon(source, at, tokens)
    if text[at] == ".":
        return _at_dot(source, at, tokens)
    if (glued := _GLUED.match(text, at)) is not None:
        return _glued_unit(source, glued)
    return None


def new_token(kind: str, value: str, span: Span) -> Token:
    return Token(kind, value, span.start, end_pos=span.end)


def _as_string(
    source: Source, start: int, end: int, inner: str, message: str, taken: int = 0
) -> Repair:
    span = Span(source, start, end)
    escaped = inner.replace("\\", "\\\\").replace('"', '\\"')
    written = f'"{escaped}"'
    found = Diagnostic(
        "syntax",
        message,
        (Label(span),),
        (),
        f"write `{printable(written, 80)}`",
        edit=Edit(span, written, safe=True),
    )
    return Repair(found, end, [new_token("STRING", written, span)], taken)


def _at_colon(source: Source, at: int, tokens: Sequence[Token]) -> Repair | None:
    """Return a path without quotes, or a value that is given with `:`."""
    last = tokens[-1] if tokens else None
    if last is None or last.type not in WORDS:
        return None
    if last.type in ("KIND", "RUN") and begins_line(last, source):
        span = Span(source, at, at + 1)
        found = Diagnostic(
            "syntax",
            "a clause has no `:`",
            (Label(span),),
            (),
            "remove the `:`",
            edit=Edit(span, "", safe=True),
        )
        return Repair(found, at + 1)
    path = _PATH.match(source.text, at)
    if path is not None and last.end_pos == at:
        inner = f"{last}{path[0].rstrip(chr(34) + chr(39))}"
        start = last.start_pos or 0
        return _as_string(source, start, path.end(), inner, "an import path stands in quotes", 1)
    span = Span(source, at, at + 1)
    found = Diagnostic(
        "syntax",
        "unexpected `:`",
        (Label(span),),
        (),
        "write `=` between a name and its value",
        edit=Edit(span, " =", safe=True),
    )
    return Repair(found, at + 1, [new_token("EQUAL", "=", span)])


def _at_dot(source: Source, at: int, tokens: Sequence[Token]) -> Repair | None:
    """Return a pattern without quotes, `blocks.*.mlp`, or a number without its first digit, `.1`."""
    digits = re.compile(r"\.(\d+(?:[eE][+-]?\d+)?)(?![\w.])").match(source.text, at)
    if digits is not None and not (tokens and tokens[-1].end_pos == at):
        span = Span(source, at, digits.end())
        written = f"0{digits[0]}"
        message = "a number begins with a digit"
        edit = Edit(span, written, safe=True)
        found = Diagnostic("syntax", message, (Label(span),), (), f"write `{written}`", edit=edit)
        return Repair(found, span.end, [new_token("NUMBER", written, span)])
    start, taken = at, 0
    while taken < len(tokens) and tokens[-1 - taken].end_pos == start:
        if tokens[-1 - taken].type not in (*WORDS, "STAR", "NUMBER"):
            break
        start, taken = tokens[-1 - taken].start_pos or 0, taken + 1
    glob = _GLOB.match(source.text, start)
    if not taken or glob is None or glob.end() <= at:
        return None
    return _as_string(
        source, start, glob.end(), glob[0], "a pattern of names stands in quotes", taken
    )


def _glued_unit(source: Source, glued: re.Match[str]) -> Repair | None:
    unit = meant_unit(glued[2])
    if unit is None:
        return None
    span = Span(source, glued.start(), glued.end())
    written = f"{glued[1]}{'' if unit == '%' else ' '}{unit}"
    found = Diagnostic(
        "syntax",
        f"`{printable(glued[0])}` is not a number",
        (Label(span),),
        (KNOWN_UNITS,),
        f"write a space before a unit: `{written}`",
        edit=Edit(span, written, safe=True),
    )
    number, rest = span.part(0, len(glued[1])), span.part(len(glued[1]), len(glued[0]))
    kind = "PERCENT" if unit == "%" else "UNIT"
    return Repair(
        found, span.end, [new_token("NUMBER", glued[1], number), new_token(kind, unit, rest)]
    )


def meant_unit(word: str) -> str | None:
    lower = word.lower()
    singular = {unit[:-1]: unit[:-1] for unit in UNITS}
    exact = lower if lower in UNITS else singular.get(lower)
    return exact or _SYNONYMS.get(lower) or nearest(lower, UNITS)


def begins_line(token: Token, source: Source) -> bool:
    start = token.start_pos or 0
    return not source.text[source.line_at(start)[0] : start].strip()
