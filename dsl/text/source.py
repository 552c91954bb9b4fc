"""Source texts and spans in them, kept as offsets; lines and columns are computed when they are printed."""

from __future__ import annotations

from trainc.dsl.text.record import Record


class Source(Record):
    """A named text; the name is what messages print."""

    name: str
    text: str

    def position(self, offset: int) -> tuple[int, int]:
        """Return the 1-based line and column of `offset`."""
        begin = self.text.rfind("\n", 0, offset) + 1
        return self.text.count("\n", 0, begin) + 1, offset - begin + 1

    def line_at(self, offset: int) -> tuple[int, int]:
        """Return the offsets at which the line around `offset` begins and ends."""
        begin = self.text.rfind("\n", 0, offset) + 1
        end = self.text.find("\n", offset)
        return begin, len(self.text) if end < 0 else end

    def span(self, start: int = 0, end: int | None = None) -> Span:
        """Return a span of this text, the whole of it by default."""
        return Span(self, start, len(self.text) if end is None else end)


class Span(Record):
    """Characters `start` up to `end` of a source."""

    source: Source
    start: int
    end: int

    @property
    def text(self) -> str:
        """Return the characters it covers."""
        return self.source.text[self.start : self.end]

    def part(self, start: int, end: int) -> Span:
        """Return the span of some of its characters, counted from its own first."""
        return Span(self.source, self.start + start, self.start + end)

    def __str__(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.name}:{line}:{column}"

    def __or__(self, other: Span) -> Span:
        """Return the smallest span that covers both."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))

    def __contains__(self, other: Span) -> bool:
        same = self.source is other.source
        return same and self.start <= other.start and other.end <= self.end


def printable(text: str, limit: int = 40) -> str:
    """Return text for quoting in a message: printable, and at most `limit` characters."""
    short = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in short)
