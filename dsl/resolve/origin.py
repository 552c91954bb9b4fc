"""Where the parts of a spec were written; equality, JSON and hash ignore these places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from trainc.dsl.text.record import Record
from trainc.dsl.text.source import Span


class Provenance(Record):
    """Where a value comes from: a default, a line, a line of an included file, or `--set`."""

    how: Literal["default", "line", "include", "set", "python"]
    span: Span | None = None
    via: tuple[Span, ...] = ()

    def __str__(self) -> str:
        if self.how in ("default", "python") or self.span is None:
            return self.how
        chain = "".join(f", included at {use}" for use in reversed(self.via))
        return f"--set {self.span.text}" if self.how == "set" else f"{self.span}{chain}"


class Origin(Record):
    """Where a clause or rule was written, and each of its parts and fields."""

    span: Span
    fields: Mapping[str, Provenance] = {}
    parts: Mapping[str, Span] = {}

    def part_span(self, part: str) -> Span:
        """Return where `on`, `every` ... or a field was written; the whole clause where it was not.

        An `every` that was not written is the construct's own, and its place is the head.
        """
        provenance = self.fields.get(part)
        found = provenance.span if provenance else self.parts.get(part)
        if found is None and part == "every":
            found = self.parts.get("head")
        return found or self.span
