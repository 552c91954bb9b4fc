"""Options that several verbs share."""

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


def overrides(given: list[str] | None) -> dict[str, str]:
    """Return `--set` options as a mapping; exits with 2 when one is not NAME=VALUE."""
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"expected NAME=VALUE, found `{text}`", param_hint="--set")
        pairs[name.strip()] = value.strip()
    return pairs
