"""`trainc influence`: which training examples a run's losses owe most to, by its checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainc.cli.common import Plot, require_drawable, require_one_process


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("influence")
    def influence(
        run: Annotated[
            Path,
            typer.Argument(
                metavar="RUN", help="The folder of a run.", exists=True, file_okay=False
            ),
        ],
        on: Annotated[
            str | None,
            typer.Option(
                "--on",
                metavar="EXAMPLES",
                help="Held-out samples by number, such as 0..7 or 3,12; train:5 is a training sample. Without it:"
                " the influence of each training sample on itself.",
            ),
        ] = None,
        last_layer: Annotated[
            bool,
            typer.Option(
                "--last-layer",
                help="Gradients of the layers with the role `head`, biases included.",
            ),
        ] = False,
        layers: Annotated[
            str | None,
            typer.Option(
                "--layers",
                metavar="SELECTOR",
                help='Gradients of these parameters or layers, such as "blocks.3.**". Default: all that trained.',
            ),
        ] = None,
        projected: Annotated[
            int | None,
            typer.Option(
                "--projected",
                metavar="D",
                min=1,
                help="With --on: compare random projections of the gradients to D numbers, which take less memory.",
            ),
        ] = None,
        among: Annotated[
            str | None,
            typer.Option(
                "--among",
                metavar="EXAMPLES",
                help="Training samples that are compared. Default: all.",
            ),
        ] = None,
        top: Annotated[int, typer.Option("--top", min=1, help="Samples shown at each end.")] = 5,
        spec: Annotated[
            Path | None,
            typer.Option(
                "--spec",
                metavar="FILE",
                help="The .train file of the run, where its model and data are not found from here.",
                exists=True,
                dir_okay=False,
            ),
        ] = None,
        device: Annotated[
            str | None, typer.Option("--device", help="cpu, cuda or mps, in place of the spec's.")
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print JSON, with the scores of all samples.")
        ] = False,
        plot: Plot = None,
    ) -> None:
        """Show which training samples a run's losses owe most to.

        The influence of a training sample z on a sample z' is what steps on z did to the loss of z', to first order:
        TracInCP, the sum over the run's checkpoints of the learning rate times the product of the two gradients.
        Proponents have positive influence, they lowered the loss of z'; opponents raised it. The influence of a sample
        on itself is large where its gradient stays large: such samples are rare, hard, or labelled wrongly.

        Each parameter has the rate that was in force, with the factors of all clauses; what an optimizer such as Adam
        makes of a gradient is not in it, and neither are the terms that clauses add to the loss. The model is in eval
        mode. Only checkpoints that were kept count: train with `checkpoint = 100 steps` and `keep = 5` in `run`, so
        that they are spread over the part of the run in which the loss fell.

        All parameters are the definition, and cost a pass for each sample. `--last-layer` is fast, but ranks training
        samples nearly alike for every z', by how large their own losses are: look at more than one layer before you
        believe a ranking.

        For instance: trainc influence runs/tonight --on 0..3 --last-layer --plot found.png
        """
        from trainc.cli.influence_text import Report, require_images
        from trainc.compiler.influence.recorded_run import RecordedRun
        from trainc.compiler.influence.selection import (
            examples_of,
            parameters_of,
            training_samples,
        )
        from trainc.compiler.influence.tracin import TracIn

        if last_layer and layers is not None:
            raise typer.BadParameter(
                "write one of --last-layer and --layers", param_hint="--layers"
            )
        if projected is not None and on is None:
            raise typer.BadParameter(
                "without --on each gradient is compared with itself alone, which needs no projection: leave it out",
                param_hint="--projected",
            )
        require_drawable(plot)
        require_one_process("influence")
        found = RecordedRun.read(run, spec, device)
        train = training_samples(among, found.data)
        others = None if on is None else examples_of(on, found.data)
        names, inventory = parameters_of(found, layers, last_layer)
        measure = TracIn(found, names, inventory, projected, tell=_progress)
        entries = sum(found.program.execution.parameters[name].numel() for name in names)
        if projected is not None and projected >= entries:
            raise typer.BadParameter(
                f"the gradients have {entries:,} entries, which take less memory as they are: leave it out, or write a"
                " smaller number",
                param_hint="--projected",
            )
        if plot is not None:
            require_images(found, train, others)
        measured = measure.measure(train, others and (others.split, others.ids))
        report = Report(found, names, train, others, measured, top)
        if as_json:
            print(json.dumps(report.to_json(), indent=1))
        else:
            report.show()
        if plot is not None:
            print(f"drew {report.draw(plot)}", file=sys.stderr)


def _progress(done: int, of: int) -> None:
    """Say on a terminal how far it is."""
    if sys.stderr.isatty():
        end = "\n" if done >= of else ""
        print(f"\r{done} of {of} gradients", end=end, file=sys.stderr, flush=True)
