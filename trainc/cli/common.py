"""Options that several verbs share."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[Path, typer.Argument(help="A .train file.", exists=True, dir_okay=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a `let`; may be repeated."),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="PASS", help="Leave out a graph pass; may be repeated."),
]


def _drawable_format(plot: Path | None) -> Path | None:
    """Return the file that is to be drawn; exits with 2 where its name ends in the name of no format."""
    if plot is not None:
        from trainc.runtime.report.picture_file import picture_format

        try:
            picture_format(plot)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return plot


Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        dir_okay=False,
        callback=_drawable_format,
        help="Also draw into this file: PNG, PDF or SVG, by the end of its name.",
    ),
]


def overrides(given: list[str] | None) -> dict[str, str]:
    """Return `--set` options as a mapping; exits with 2 when one is not NAME=VALUE."""
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"expected NAME=VALUE, found `{text}`", param_hint="--set")
        pairs[name.strip()] = value.strip()
    return pairs


def require_drawable(plot: Path | None) -> None:
    """Say what is missing, and exit with 1, where a picture is asked for that cannot be drawn."""
    if plot is not None and find_spec("matplotlib") is None:
        print("trainc: --plot needs matplotlib: pip install trainc[plots]", file=sys.stderr)
        raise typer.Exit(1)


def require_one_process(verb: str) -> None:
    """Raise ValueError where a launcher started several processes: each would do the same, and write the same files."""
    from trainc.runtime.processes.launch import find_launch

    launch = find_launch()
    if launch is not None and launch.size > 1:
        raise ValueError(
            f"`trainc {verb}` works in one process, and a launcher started {launch.size}: start it without the launcher"
        )
