"""Diagnostics as text for people: messages, lines of the spec, and carets under the place."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.text.diagnostic import Diagnostic
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
    """Return all diagnostics as text for people, with a blank line after each."""
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
    """Return text that is safe on any terminal: each character becomes one visible character."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if c == "\t" else c if c.isprintable() else "\ufffd" for c in text)


def columns(text: str) -> int:
    """Return the width of a text on a terminal, in columns."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)
