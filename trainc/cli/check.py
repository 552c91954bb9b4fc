"""`trainc check`: report every mistake in a spec, without torch and without importing its model."""

import sys
from collections.abc import Sequence
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

from trainc.compiler.catalog import catalog
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.render import render_text
from trainc.dsl.text.source import Source

if TYPE_CHECKING:
    import typer

Form = Literal["text", "json", "sarif", "github"]


def check_specs(
    names: Sequence[str], settings: Sequence[str] = (), form: Form = "text", fix: bool = False
) -> int:
    """Check the specs in files, `-` for standard input; print the mistakes and return the exit code.

    With `fix` the edits that cannot change what was meant are made in the files first.
    """
    found: list[Diagnostic] = []
    for name in names:
        if fix and name != "-":
            from trainc.dsl.resolve.fixes import fix_file

            for edit in fix_file(Path(name), catalog(), settings):
                print(f"{edit.span}: {edit}", file=sys.stderr)
        spec = Source("<stdin>", sys.stdin.read()) if name == "-" else Path(name)
        checked = load_spec(spec, catalog(), settings)
        found += checked.diagnostics
        if form == "text" and checked.spec:
            clauses, rules = len(checked.spec.clauses), len(checked.spec.rules)
            print(f"{name}: {_count(clauses, 'clause')}, {_count(rules, 'rule')}")
    if found or form != "text":
        sys.stdout.write(_render(found, form))
    errors = sum(d.severity == "error" for d in found)
    if form == "text" and found:
        warnings = len(found) - errors
        print(", ".join(_count(n, w) for n, w in ((errors, "error"), (warnings, "warning")) if n))
    return 1 if errors else 0


def check_quickly(arguments: Sequence[str]) -> int | None:
    """Do what `trainc check` does with these arguments; None for arguments that need the framework.

    Editors and hooks run it on every save, and importing the framework would take a quarter of the time.
    """
    names: list[str] = []
    fix = "--fix" in arguments
    given: dict[str, list[str]] = {"--set": [], "--format": []}
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in given:
            given[option].append(value if equals else next(words, ""))
        elif word == "--fix":
            continue
        elif word.startswith("-") and word != "-":
            return None
        else:
            names.append(word)
    form = given["--format"][-1] if given["--format"] else "text"
    if not names or form not in get_args(Form) or "" in given["--set"]:
        return None
    # pydantic would read the metadata of every installed package to find plugins for its schemas.
    environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    return check_specs(names, given["--set"], cast(Form, form), fix)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _render(found: Sequence[Diagnostic], form: Form) -> str:
    if form == "text":
        colour = sys.stdout.isatty() and not environ.get("NO_COLOR")
        return render_text(found, colour=colour)
    from trainc.dsl.text.machine_formats import render_github, render_json, render_sarif

    if form == "github":
        return render_github(found)
    if form == "json":
        return render_json(found) + "\n"
    from importlib.metadata import version

    return render_sarif(found, version("trainc")) + "\n"


def register(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("check")
    def check(
        specs: Annotated[
            list[str], typer.Argument(metavar="SPEC...", help="Files; `-` is standard input.")
        ],
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Set a `let`; may be repeated."),
        ] = None,
        form: Annotated[
            Form, typer.Option("--format", help="How to print the diagnostics.")
        ] = "text",
        fix: Annotated[
            bool,
            typer.Option("--fix", help="Correct in the files what can mean only one thing."),
        ] = False,
    ) -> None:
        """Report every mistake in a spec."""
        raise typer.Exit(check_specs(specs, settings or (), form, fix))
