"""A file and everything it includes, as one list of statements."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.parser import parse
from trainc.dsl.syntax.tokens import MAX_CHARACTERS
from trainc.dsl.text.diagnostic import Diagnostic, Diagnostics, Label
from trainc.dsl.text.record import Record
from trainc.dsl.text.source import Source, Span, printable

MAX_CHAIN = 32
ALLOWED = "TRAINC_USE_PATH"
"""The environment variable with folders outside the spec's from which `use` may read."""


class PlacedStatement(Record):
    """A statement and the `use` lines that led to it, outermost first."""

    statement: ast.Statement
    via: tuple[Span, ...] = ()


def read_source(path: Path, name: str | None = None) -> tuple[Source, list[Diagnostic]]:
    """Return the text of a file, and a diagnostic where its bytes are not UTF-8.

    Raises OSError where there is none, and, without waiting, for what is not a plain file.
    """
    data = _read(path, 4 * MAX_CHARACTERS + 1)
    text = data.decode("utf-8", "replace")
    source = Source(name or str(path), text.removeprefix("\ufeff").replace("\r\n", "\n"))
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(text) > MAX_CHARACTERS:
            return source, []
        at = min(source.text.find("\ufffd") if "\ufffd" in source.text else 0, len(source.text))
        label = Label(source.span(at, at + 1), f"byte 0x{data[error.start]:02x}")
        return source, [Diagnostic("not-text", "this file is not UTF-8 text", (label,))]
    return source, []


def _read(path: Path, most: int) -> bytes:
    """Return the first bytes of a plain file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as file:  # noqa: PTH123 - a handle, not a path
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            why = "Not a plain file, such as a pipe or a device; write `-` to check standard input"
            raise OSError(errno.EINVAL, why, str(path))
        return file.read(most)


class CollectedStatements:
    """The statements of a source and of the files it uses.

    `lost` are the names that unreadable statements would have defined.
    """

    def __init__(self, source: Source, path: Path | None) -> None:
        chain: dict[Path, Span | None] = {path.resolve(): None} if path else {}
        self.found = Diagnostics()
        self.lost: set[str] = set()
        self._seen = set(chain)
        self._folders = [(path.parent if path else Path()).resolve()]
        allowed = os.environ.get(ALLOWED, "").split(os.pathsep)
        self._folders += [Path(folder).resolve() for folder in allowed if folder]
        self.statements = list(self._collect(source, path, (), chain))

    def _collect(
        self,
        source: Source,
        path: Path | None,
        via: tuple[Span, ...],
        chain: dict[Path, Span | None],
    ) -> Iterator[PlacedStatement]:
        parsed = parse(source)
        self.found += parsed.found
        self.lost |= parsed.lost
        for statement in parsed.tree.statements:
            if not isinstance(statement, ast.Use):
                yield PlacedStatement(statement, via)
                continue
            where = _locate(statement, path)
            if where in chain:
                first = [*chain.values(), statement.span][1] or statement.span
                labels = [Label(statement.span, "this file is already being read")]
                if first != statement.span:
                    labels.append(Label(first, "the first include is here"))
                text = f"`{printable(statement.path.value)}` includes itself"
                self.found.report("include-cycle", text, *labels)
                continue
            if where in self._seen:
                continue
            self._seen.add(where)
            if not any(where.is_relative_to(folder) for folder in self._folders):
                self._report_outside(statement, where)
                continue
            if len(chain) >= MAX_CHAIN:
                message = f"files are included more than {MAX_CHAIN} levels deep"
                self.found.report("too-deep", message, Label(statement.span))
                continue
            try:
                inner, problems = read_source(where, _shown(where))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                label = Label(statement.path.span, reason.lower())
                message = f"cannot read `{printable(statement.path.value)}`"
                looked = printable(_shown(where), 200)
                note = f"paths are relative to the file that contains the `use`: trainc looked for {looked}"
                self.found.report("use-not-found", message, label, notes=(note,))
                self.lost.add("*")
                continue
            if problems:
                self.found += problems
                self.lost.add("*")
                continue
            longer = {**chain, where: statement.span}
            yield from self._collect(inner, where, (*via, statement.span), longer)

    def _report_outside(self, statement: ast.Use, where: Path) -> None:
        """Report a file that is not below the spec's folder: whoever wrote the spec may not be who runs it."""
        self.found.report(
            "use-outside",
            f"`{printable(statement.path.value)}` is not in the folder of the spec, nor in a folder below",
            Label(statement.path.span, printable(_shown(where), 200)),
            help=f"move the file there, or set the environment variable {ALLOWED} to its folder",
        )
        self.lost.add("*")


def _locate(statement: ast.Use, path: Path | None) -> Path:
    base = path.parent if path else Path()
    try:
        return (base / statement.path.value).resolve()
    except (OSError, ValueError):
        return base.resolve() / statement.path.value


def _shown(path: Path) -> str:
    """Return a path, relative to the working directory if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
