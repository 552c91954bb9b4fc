"""`trainc check`: every mistake in a spec, without torch and without running anybody's code."""

import sys
from collections.abc import Sequence
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from trainc.compiler.catalog import catalog
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.render import render_text
from trainc.dsl.text.source import Source

if TYPE_CHECKING:
    import typer

Form = Literal["text", "json", "sarif", "github"]


def check_specs(names: Sequence[str], settings: Sequence[str] = (), form: Form = "text") -> int:
    """Check specs by file name or `-`, print what was found, return the exit code."""
    found: list[Diagnostic] = []
    for name in names:
        spec = Source("<stdin>", sys.stdin.read()) if name == "-" else Path(name)
        checked = load_spec(spec, catalog(), settings)
        found += checked.diagnostics
        if form == "text" and checked.spec:
            clauses, rules = len(checked.spec.clauses), len(checked.spec.rules)
            print(f"{name}: {_count(clauses, 'clause')}, {_count(rules, 'rule')}")
    sys.stdout.write(_render(found, form))
    errors = sum(d.severity == "error" for d in found)
    if form == "text" and found:
        warnings = len(found) - errors
        print(", ".join(_count(n, w) for n, w in ((errors, "error"), (warnings, "warning")) if n))
    return 1 if errors else 0


def quick(arguments: Sequence[str]) -> int | None:
    """Check files named without any option, None where there is one.

    Editors and hooks run `trainc check FILE` on every save, and a fifth of its time would go into
    importing a parser for the command line.
    """
    if not arguments or any(a.startswith("-") and a != "-" for a in arguments):
        return None
    # pydantic would read the metadata of every installed package to find plugins for its schemas.
    environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    return check_specs(arguments)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _render(found: Sequence[Diagnostic], form: Form) -> str:
    if form == "text":
        return render_text(found, colour=_wants_colour())
    from trainc.dsl.text.machine_formats import render_github, render_json, render_sarif

    if form == "github":
        return render_github(found)
    return (render_json if form == "json" else render_sarif)(found) + "\n"


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not environ.get("NO_COLOR")


def register(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("check")
    def check(
        specs: Annotated[
            list[str], typer.Argument(metavar="SPEC...", help="Files; `-` reads standard input.")
        ],
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Replace the value of a `let`."),
        ] = None,
        form: Annotated[
            Form, typer.Option("--format", help="How to print what was found.")
        ] = "text",
    ) -> None:
        """Report every mistake in a spec."""
        raise typer.Exit(check_specs(specs, settings or (), form))
