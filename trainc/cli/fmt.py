"""`trainc fmt`: rewrite specs in their canonical form."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trainc.dsl.printing.formatter import format_source
from trainc.dsl.resolve.includes import read_source
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.source import Source

if TYPE_CHECKING:
    import typer


def format_files(names: Sequence[str], check: bool = False, diff: bool = False) -> int:
    """Format files, folders or `-`; with `check` or `diff` write nothing, and return 1 if a file would change."""
    changed = broken = False
    for path in _files(names):
        try:
            source, after = _formatted(path)
        except SpecError as error:
            print(str(error).strip("\n"), file=sys.stderr)
            broken = True
            continue
        differs = after != source.text
        changed |= differs
        if diff:
            sys.stdout.writelines(_diff(source, after))
        elif path is None and not check:
            sys.stdout.write(after)
        elif differs and check:
            print(f"{source.name} is not in canonical form: run `trainc fmt`")
        elif differs and path is not None:
            path.write_text(after, encoding="utf-8", newline="\n")
            print(f"{path} rewritten")
    return 1 if broken or (changed and (check or diff)) else 0


def _files(names: Sequence[str]) -> Iterator[Path | None]:
    for name in names:
        path = Path(name)
        if name == "-":
            yield None
        elif path.is_dir():
            yield from sorted(path.rglob("*.train"))
        else:
            yield path


def _formatted(path: Path | None) -> tuple[Source, str]:
    if path is None:
        source = Source("<stdin>", sys.stdin.read())
    else:
        source, found = read_source(path)
        if found:
            raise SpecError(found)
    after = format_source(source)
    if path is not None and b"\r\n" in path.read_bytes():
        source = Source(source.name, source.text.replace("\n", "\r\n"))
    return source, after


def _diff(source: Source, after: str) -> Iterator[str]:
    from difflib import unified_diff

    before = source.text.splitlines(keepends=True)
    return unified_diff(
        before, after.splitlines(keepends=True), source.name, f"{source.name} (formatted)"
    )


def register(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("fmt")
    def fmt(
        files: Annotated[
            list[str],
            typer.Argument(metavar="FILE...", help="Specs or folders; `-` is standard input."),
        ],
        check: Annotated[
            bool, typer.Option("--check", help="Write nothing; exit with 1 if a file would change.")
        ] = False,
        diff: Annotated[
            bool, typer.Option("--diff", help="Write nothing; print what would change.")
        ] = False,
    ) -> None:
        """Rewrite a spec in its canonical form."""
        raise typer.Exit(format_files(files, check, diff))
