"""Diagnostics as text with carets, JSON, SARIF and GitHub annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.source import Span

_WINDOW = 100  # characters of a long line that are shown
_PAINT = {
    "error": "\x1b[1;31m",
    "warning": "\x1b[1;33m",
    "place": "\x1b[1;34m",
    "help": "\x1b[1;32m",
}
_PLAIN = "\x1b[0m"


def render_text(diagnostics: Iterable[Diagnostic], colour: bool = False) -> str:
    """Return all diagnostics as people read them, a blank line after each."""
    return "".join(f"{_render(d, colour)}\n\n" for d in diagnostics)


def _render(d: Diagnostic, colour: bool) -> str:
    def paint(text: str, kind: str) -> str:
        return f"{_PAINT[kind]}{text}{_PLAIN}" if colour else text

    lines = [f"{paint(f'{d.severity}[{d.rule}]', d.severity)}: {safe(d.message)}"]
    width = max((len(str(_line(label.span))) for label in d.labels), default=1)
    gutter = " " * width
    bar = paint("|", "place")
    for n, label in enumerate(d.labels):
        caret = "^" if n == 0 else "-"
        line, shown, column, size = _excerpt(label.span)
        arrow = paint("-->" if n == 0 else ":::", "place")
        kind = d.severity if n == 0 else "place"
        mark = paint(f"{caret * size} {safe(label.text)}".rstrip(), kind)
        lines += [
            f"{gutter}{arrow} {safe(str(label.span))}",
            f"{gutter} {bar}",
            f"{paint(str(line).rjust(width), 'place')} {bar} {shown}".rstrip(),
            f"{gutter} {bar} {' ' * column}{mark}",
        ]
    equals = f"{gutter} {paint('=', 'place')}"
    lines += [f"{equals} note: {safe(note)}" for note in d.notes]
    if d.help:
        lines.append(f"{equals} {paint('help', 'help')}: {safe(d.help)}")
    return "\n".join(lines)


def _line(span: Span) -> int:
    return span.source.position(span.start)[0]


def _excerpt(span: Span) -> tuple[int, str, int, int]:
    """Return the line number, the part of the line that is shown, and where the carets go."""
    begin, end = span.source.line_at(span.start)
    left = begin
    if end - begin > _WINDOW:
        left = max(begin, min(span.start - _WINDOW // 2, end - _WINDOW))
    right = min(end, left + _WINDOW)
    text = span.source.text
    before, under = safe(text[left : span.start]), safe(text[span.start : min(span.end, right)])
    after = safe(text[max(span.start, min(span.end, right)) : right])
    lead = "..." if left > begin else ""
    trail = "..." if right < end else ""
    column = len(lead) + columns(before)
    return _line(span), f"{lead}{before}{under}{after}{trail}", column, max(1, columns(under))


def safe(text: str) -> str:
    """Return text that moves no cursor and encodes anywhere: one visible character for each."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if c == "\t" else c if c.isprintable() else "\ufffd" for c in text)


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _place(label: Label) -> dict[str, Any]:
    source = label.span.source
    (line, column), (end_line, end_column) = map(
        source.position, (label.span.start, label.span.end)
    )
    return {
        "file": safe(source.name),
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
        "text": safe(label.text),
    }


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """Return a JSON list, one object per diagnostic, for editors and scripts."""
    return json.dumps(
        [
            {
                "rule": d.rule,
                "severity": d.severity,
                "message": safe(d.message),
                "labels": [_place(label) for label in d.labels],
                "notes": [safe(note) for note in d.notes],
                "help": d.help and safe(d.help),
                "edit": d.edit and {**_place(Label(d.edit.span)), "text": safe(d.edit.text)},
            }
            for d in diagnostics
        ],
        indent=2,
    )


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """Return workflow commands that GitHub shows beside the lines."""

    def escape(text: str, more: str = "") -> str:
        for c in "%\r\n" + more:
            text = text.replace(c, f"%{ord(c):02X}")
        return text

    lines = []
    for d in diagnostics:
        where = {"title": d.rule}
        if d.labels:
            place = _place(d.labels[0])
            where |= {
                "file": place["file"],
                "line": str(place["line"]),
                "col": str(place["column"]),
            }
            where |= {"endLine": str(place["end_line"]), "endColumn": str(place["end_column"])}
        keys = ",".join(f"{key}={escape(value, ':,')}" for key, value in where.items())
        parts = [
            safe(d.message),
            *(safe(x.text) for x in d.labels[:1] if x.text),
            safe(d.help or ""),
        ]
        lines.append(f"::{d.severity} {keys}::{escape('; '.join(filter(None, parts)))}")
    return "".join(f"{line}\n" for line in lines)


def render_sarif(diagnostics: Sequence[Diagnostic]) -> str:
    """Return a SARIF 2.1.0 log, for code-scanning services."""
    from trainc.dsl.text.rules import RULES

    used = sorted({d.rule for d in diagnostics})
    rules = [
        {
            "id": rule,
            "shortDescription": {"text": RULES[rule].what},
            "help": {"text": RULES[rule].fix},
        }
        for rule in used
    ]
    results = []
    for d in diagnostics:
        places = [_sarif_place(label) for label in d.labels]
        text = d.message if not d.help else f"{d.message} ({d.help})"
        result: dict[str, Any] = {
            "ruleId": d.rule,
            "ruleIndex": used.index(d.rule),
            "level": d.severity,
            "message": {"text": safe(text)},
            "locations": places[:1],
        }
        if places[1:]:
            result["relatedLocations"] = places[1:]
        results.append(result)
    driver = {"name": "trainc", "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(log, indent=2)


def _sarif_place(label: Label) -> dict[str, Any]:
    place = _place(label)
    region = {
        "startLine": place["line"],
        "startColumn": place["column"],
        "endLine": place["end_line"],
        "endColumn": place["end_column"],
    }
    out: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": place["file"]}, "region": region}
    }
    if label.text:
        out["message"] = {"text": place["text"]}
    return out
