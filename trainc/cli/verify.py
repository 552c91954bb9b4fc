"""`trainc verify`: compare the compiled model with the original on a real batch."""

from typing import Annotated

import typer

from trainc.cli.common import Overrides, SpecFile, Without, overrides


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("verify")
    def verify(
        spec: SpecFile,
        set_: Overrides = None,
        without: Without = None,
        double: Annotated[bool, typer.Option("--double", help="Compare in float64.")] = False,
    ) -> None:
        """Compare the compiled model with the original on a real batch and report the largest errors.

        Up to three comparisons: the graph with every strength at zero with the original model; the graph with the
        bound modules at full strength; the measured per-example norms with one backward pass for each example.
        """
        from rich.console import Console
        from rich.table import Table

        from trainc.compiler.driver.verify import verify as compare

        rows = compare(spec, overrides(set_), without or (), double=double)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("compared", "what", "largest error", "allowed", ""):
            table.add_column(column)
        for row in rows:
            table.add_row(
                row.title,
                row.what,
                f"{row.error:.2e}",
                f"{row.allowed:.0e}",
                "ok" if row.ok else "DIFFERS",
            )
        Console(highlight=False).print(table)
        if not all(row.ok for row in rows):
            raise typer.Exit(1)
