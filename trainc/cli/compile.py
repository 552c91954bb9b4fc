"""`trainc compile`: save the program that a spec compiles to."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainc.cli.common import Overrides, SpecFile, Without, overrides


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("compile")
    def compile_(
        spec: SpecFile,
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Folder for the program.", file_okay=False)
        ],
        set_: Overrides = None,
        without: Without = None,
    ) -> None:
        """Save the program that a spec compiles to: plan and graph as JSON, weights as safetensors.

        `trainc.load(FOLDER, model)` binds the program to a model, without the spec; no code from the folder is run.
        """
        from trainc.compiler.driver.inspect import capture_program
        from trainc.dsl.text.render import render_text

        program = capture_program(spec, overrides(set_), without or ())
        if program.plan.warnings:
            print(render_text(program.plan.warnings).strip("\n"), file=sys.stderr)
        program.save(output)
        graph = program.graph
        print(f"{output}: plan {program.plan.hash[:16]}, graph of {len(graph.graph.nodes)} nodes")
        for report in graph.reports:
            sites = (
                f"{len(report.sites)} sites, {report.nodes_before} -> {report.nodes_after} nodes"
            )
            print(f"  {report.name}: {sites if report.ran else 'not needed by any clause'}")
            for site in report.unserved:
                print(f"    not changed: {site}")
