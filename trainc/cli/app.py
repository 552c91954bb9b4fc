"""The `trainc` command: imports the module of the verb asked for and no other.

Exit codes: 0 done, 1 a mistake in the spec, its model, data or files, 2 a mistake in the command line,
3 a run that a loss which is not finite ended, 130 interrupted, 141 nobody reads the output, 143 terminated.
"""

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trainc.cli.failures import FAILURES, exit_code

SUMMARIES = {
    "check": "Report every mistake in a spec.",
    "fmt": "Rewrite a spec in its canonical form.",
    "explain": "Describe a construct, a diagnostic or a word of the language.",
    "plan": "Show what a spec does to its model, without training.",
    "compile": "Save the program that a spec compiles to.",
    "run": "Train the spec's model on its data.",
    "delta": "Export what a run changed of its weights, or apply it.",
    "fit": "Fit laws to several runs.",
    "learn-init": "Learn the initial weights of a model over tasks.",
    "verify": "Compare the compiled model with the original on real input.",
    "report": "Summarise finished runs, side by side.",
    "influence": "Show which training samples a run's losses owe most to.",
    "spectrum": "Show how heavy the tails of the spectra of weights are.",
    "tune": "Find the fastest launches of the norm kernels on this GPU.",
}


class Verbs(TyperGroup):
    """Holds a placeholder for each verb, for help and suggestions; only the verb that runs is imported."""

    def __init__(self, **attributes: Any) -> None:
        attributes["commands"] = {v: TyperCommand(v, help=s) for v, s in SUMMARIES.items()}
        super().__init__(**attributes)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Replace the placeholder of the verb that runs by its command."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, stand_in and _load(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; print errors that users can cause as a message, and exit with their code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe can still be said
            return result
        except FAILURES as error:
            raise typer.Exit(exit_code(error)) from None


def _load(verb: str) -> Any:
    scope = typer.Typer(rich_markup_mode=None)
    import_module(f"trainc.cli.{verb.replace('-', '_')}").register(scope)
    return typer.main.get_group(scope).commands[verb]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trainc {version('trainc')}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(help="A compiler for training methods.")
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show version."),
    ] = False,
) -> None:
    """Take the options before the verb."""


def main() -> None:
    """Run the command line and exit."""
    try:
        app(prog_name="trainc")
    except SystemExit as left:
        launch, code = sys.modules.get("trainc.runtime.processes.launch"), left.code or 0
        # One that failed, with 1 or a text, ends slowly: the others can say so before they are ended.
        if launch and launch.is_one_of_several() and isinstance(code, int) and code != 1:
            launch.end_process(code)
        raise
