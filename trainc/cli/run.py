"""`trainc run`: train the spec's model on its data."""

import os
import time
from pathlib import Path
from typing import Annotated, Literal

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
        device: Annotated[
            Literal["auto", "cpu", "cuda", "mps"] | None,
            typer.Option(
                "--device",
                help="Train on this device, whatever the spec's `device` says.",
                show_default=False,
            ),
        ] = None,
        log: Annotated[
            Literal["tensorboard", "wandb", "trackio"] | None,
            typer.Option(
                "--log",
                help="Log to it as well, whatever the spec's `log` says.",
                show_default=False,
            ),
        ] = None,
        preflight: Annotated[
            bool,
            typer.Option(
                "--preflight/--no-preflight",
                help="Say what the run takes, and refuse it where memory or disk do not suffice.",
            ),
        ] = True,
        plain: Annotated[
            bool, typer.Option("--plain", help="Print lines instead of a live display.")
        ] = False,
    ) -> None:
        """Train the spec's model on its data, on the GPU where there is one (`--device`, or `device` of `run`).

        Writes metrics.jsonl, checkpoints and a summary to the folder. An interrupt saves a checkpoint and ends
        the run; `--resume` continues it bit for bit. A run that was killed before its first save is started again
        by the same command.

        Before the first step it says what memory and disk the run takes by its plan, and after the first two what
        memory and time as measured. A run that cannot fit is refused; `--no-preflight` starts it all the same.

        The exit code is 0 where the run reached its end or a rule stopped it, 4 where it did but steps were
        skipped (`on_nan = skip`), 3 where it ended at a step or with weights that are not finite, 130 or 143 where
        a signal ended it, and 1 for an error.
        """
        if accept and not resume:
            raise typer.BadParameter("it needs `--resume`", param_hint="--accept")
        if overwrite and resume:
            raise typer.BadParameter(
                "it starts a new run: leave out `--resume`", param_hint="--overwrite"
            )
        from trainc.compiler.driver.train import train

        summary = train(
            spec,
            out,
            overrides=overrides(set_),
            without=without or (),
            resume=resume,
            overwrite=overwrite,
            accept=accept,
            device=device,
            log=log,
            preflight=preflight,
            plain=plain,
        )
        if os.environ.get("RANK", "0") == "0":
            for line in summary.lines:
                print(f"  {line}")
            print(f"{summary.reason}: {summary.message}")
        elif summary.exit_code:
            time.sleep(
                1
            )  # torchrun ends all processes as soon as one fails, and rank 0 still prints
        raise typer.Exit(summary.exit_code)
