"""The formatter of `trainc fmt`: canonical text that keeps all comments, and blank lines as single ones."""

from __future__ import annotations

from collections.abc import Iterator

from trainc.dsl.printing.canonical import (
    braced,
    format_action,
    format_field,
    format_head,
    format_statement,
    format_when,
)
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.parser import parse
from trainc.dsl.syntax.tokens import comments_of
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.source import Source, Span

_INDENT = "    "
Item = ast.Field | ast.Action


class _Around:
    """The comments of a field: those on lines before it, and those at the end of its line."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.beside: list[str] = []


def format_source(source: Source) -> str:
    """Return the canonical text of a spec, or raise SpecError where it cannot be parsed."""
    parsed = parse(source)
    if parsed.found:
        raise SpecError(parsed.found)
    return _Writer(source, parsed.tree, comments_of(source)).text()


class _Writer:
    def __init__(self, source: Source, tree: ast.Tree, comments: list[Span]) -> None:
        self.source = source
        self.tree = tree
        self.comments = comments
        self.taken = 0

    def text(self) -> str:
        lines: list[str] = []
        end = 0
        for statement in self.tree.statements:
            above = self._until(statement.span.start)
            for comment in above:
                if lines and self._blank(end, comment.start):
                    lines.append("")
                lines.append(comment.text.rstrip())
                end = comment.end
            if lines and self._blank(end, statement.span.start):
                lines.append("")
            inside = self._until(statement.span.end)
            beside = self._beside(statement.span.end)
            lines += self._statement(statement, inside, beside)
            end = beside[-1].end if beside else statement.span.end
        for comment in self.comments[self.taken :]:
            if lines and self._blank(end, comment.start):
                lines.append("")
            lines.append(comment.text.rstrip())
            end = comment.end
        return "".join(f"{line}\n" for line in lines)

    def _until(self, offset: int) -> list[Span]:
        """Take the comments that begin before an offset."""
        begin = self.taken
        while self.taken < len(self.comments) and self.comments[self.taken].start < offset:
            self.taken += 1
        return self.comments[begin : self.taken]

    def _beside(self, offset: int) -> list[Span]:
        """Take the comment at the end of the line, if only the comment follows."""
        following = self.comments[self.taken : self.taken + 1]
        if following and not self.source.text[offset : following[0].start].strip(" \t,"):
            self.taken += 1
            return following
        return []

    def _blank(self, begin: int, end: int) -> bool:
        return self.source.text.count("\n", begin, end) > 1

    def _statement(
        self, statement: ast.Statement, inside: list[Span], beside: list[Span]
    ) -> Iterator[str]:
        tail = "".join(f"  {comment.text.rstrip()}" for comment in beside)
        items: tuple[Item, ...] = ()
        if isinstance(statement, ast.ClauseTree):
            items, head = statement.fields or (), format_head(statement)
        elif isinstance(statement, ast.When):
            items, head = statement.actions, format_when(statement)
        if not items:
            yield from (comment.text.rstrip() for comment in inside)
            yield f"{format_statement(statement)}{tail}"
            return
        around, above, last = self._attach(items, inside)
        yield from above
        split = (
            self._ends_with_comma(items[-1])
            or bool(last)
            or any(a.before or a.beside for a in around)
        )
        texts = [format_field(i) if isinstance(i, ast.Field) else format_action(i) for i in items]
        if not split:
            yield from f"{braced(head, texts)}{tail}".split("\n")
            return
        yield f"{head} {{"
        for text, comments in zip(texts, around, strict=True):
            yield from (f"{_INDENT}{c}" for c in comments.before)
            inner = text.replace("\n", f"\n{_INDENT}")
            yield from f"{_INDENT}{inner},{''.join(f'  {c}' for c in comments.beside)}".split("\n")
        yield from (f"{_INDENT}{c}" for c in last)
        yield f"}}{tail}"

    def _ends_with_comma(self, item: Item) -> bool:
        """Say whether a comma follows the last field; then each field gets its own line."""
        rest = self.source.text[item.span.end : item.span.end + 200]
        return rest.lstrip(" \t\r\n").startswith(",")

    def _attach(
        self, items: tuple[Item, ...], inside: list[Span]
    ) -> tuple[list[_Around], list[str], list[str]]:
        """Assign each comment to the field below it or left of it, to the head, or to the end."""
        around = [_Around() for _ in items]
        above: list[str] = []
        last: list[str] = []
        for comment in inside:
            text = comment.text.rstrip()
            begin = self.source.text.rfind("\n", 0, comment.start) + 1
            alone = not self.source.text[begin : comment.start].strip()
            following = next((n for n, i in enumerate(items) if i.span.end > comment.start), None)
            preceding = [n for n, i in enumerate(items) if begin <= i.span.end <= comment.start]
            if not alone and preceding:
                around[preceding[-1]].beside.append(text)
            elif following is None:
                last.append(text)
            elif following == 0 and not alone:
                above.append(text)
            else:
                around[following].before.append(text)
        return around, above, last
