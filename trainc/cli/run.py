"""`trainc run`: train the spec's model on its data."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainc.cli.common import Overrides, SpecFile, Without, overrides


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("run")
    def run(
        spec: SpecFile,
        out: Annotated[
            Path, typer.Option("--out", "-o", help="Folder for the run.", file_okay=False)
        ],
        set_: Overrides = None,
        without: Without = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Continue from the newest intact checkpoint.")
        ] = False,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Move an older run in the folder aside.")
        ] = False,
        accept: Annotated[
            bool,
            typer.Option(
                "--accept", help="Resume with a changed spec; keep the state that still fits."
            ),
        ] = False,
        plain: Annotated[
            bool, typer.Option("--plain", help="Print lines instead of a live display.")
        ] = False,
    ) -> None:
        """Train the spec's model on its data.

        Writes metrics.jsonl, checkpoints and a summary to the folder. An interrupt saves a checkpoint and ends
        the run; `--resume` continues it bit for bit.
        """
        from trainc.compiler.driver.train import train
        from trainc.runtime.storage.checkpoint import DamagedCheckpoint
        from trainc.runtime.storage.run_folder import RunExists

        try:
            summary = train(
                spec,
                out,
                overrides=overrides(set_),
                without=without or (),
                resume=resume,
                overwrite=overwrite,
                accept=accept,
                plain=plain,
            )
        except (RunExists, DamagedCheckpoint) as error:
            print(f"trainc: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        for line in summary.lines:
            print(f"  {line}")
        print(f"{summary.reason}: {summary.message}")
        raise typer.Exit(summary.exit_code)
