"""`trainc plan`: show what a spec does to its model, without training."""

from typing import Annotated, Literal

import typer

from trainc.cli.common import Overrides, SpecFile, overrides


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("plan")
    def plan(
        spec: SpecFile,
        set_: Overrides = None,
        format: Annotated[
            Literal["text", "json"], typer.Option(help="Tables for people, or JSON for programs.")
        ] = "text",
        diff: Annotated[
            str | None,
            typer.Option(
                metavar="PASS", help="Show how one graph pass changes the captured graph."
            ),
        ] = None,
        full: Annotated[
            bool, typer.Option("--full", help="Print every row of long tables.")
        ] = False,
    ) -> None:
        """Show what a spec does to its model, without training.

        Builds the model on the meta device: no weights are allocated and no data is touched. With `--diff PASS` the
        model is built for real and captured on one batch.
        """
        import json
        import sys

        from trainc.compiler.driver import compile as compiling

        if diff is not None:
            from trainc.compiler.driver.inspect import pass_diff

            print(pass_diff(spec, diff, overrides(set_)))
            return
        made = compiling.plan(spec, overrides=overrides(set_))
        if format == "json":
            print(json.dumps(made.to_json(), indent=1, sort_keys=True))
            return
        from trainc.cli.plan_text import print_plan

        if made.warnings:
            from trainc.dsl.text.render import render_text

            print(render_text(made.warnings).strip("\n"), file=sys.stderr)
        print_plan(made, full)
