"""`trainc report`: summarise finished runs, side by side."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainc.cli.common import Plot, require_drawable
from trainc.compiler.driver.recorded_clauses import (
    draw_runs,
    figure_rows,
    tables_of,
    unread_clauses,
)
from trainc.compiler.model.import_path import only_trusted
from trainc.runtime.report import tables
from trainc.runtime.report.number_text import format_loss
from trainc.runtime.report.recorded_files import read_seconds, read_summary
from trainc.runtime.report.run_records import RunRecords
from trainc.runtime.storage.jsonl import Record

WIDE = 132


@dataclass(frozen=True)
class RecordedRun:
    """One run, read from its folder; an unfinished or killed run has no summary."""

    folder: Path

    @cached_property
    def recorded(self) -> RunRecords:
        """Return its records and its plan."""
        return RunRecords.of(self.folder, self.folder.name, "")

    @cached_property
    def steps(self) -> list[Record]:
        """Return the records of training steps."""
        return self.recorded.steps

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Return the summary that the run wrote at its end; empty without one."""
        return read_summary(self.folder / "summary.json")

    @property
    def seconds(self) -> float:
        """Return the time of all its steps, those before a resume included."""
        return read_seconds(self.folder / "timing.jsonl")

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Return the steps at which it was evaluated, with the losses."""
        return [(r["step"], r["eval_loss"]) for r in self.recorded.records if "eval_loss" in r]

    @property
    def reason(self) -> str:
        """Return why it ended."""
        reason: str = self.summary.get("reason", "not ended")
        return reason


def _recent(run: RecordedRun) -> str:
    """Return the mean training loss over the last tenth of the samples, skipped steps left out."""
    counter = "samples" if all("samples" in record for record in run.steps) else "step"
    begin = 0.9 * run.steps[-1][counter]
    late = [r for r in run.steps if r[counter] > begin and not r.get("skipped")]
    total = sum(record.get("batch", 1) for record in late)
    if not total:
        return "none"
    return format_loss(sum(record["loss"] * record.get("batch", 1) for record in late) / total)


def _evaluation(run: RecordedRun) -> str:
    return format_loss(run.evaluations[-1][1]) if run.evaluations else "none"


def _lowest(run: RecordedRun) -> str:
    known = [one for one in run.evaluations if not math.isnan(one[1])]
    if not known:
        return "none"
    step, loss = min(known, key=lambda one: one[1])
    return f"{format_loss(loss)} at step {step}"


def _batches(run: RecordedRun) -> str:
    first, last = run.steps[0]["batch"], run.steps[-1]["batch"]
    return f"{first}" if first == last else f"{first} -> {last}"


FIGURES: dict[str, Callable[[RecordedRun], str]] = {
    "ended": lambda run: run.reason,
    "steps": lambda run: f"{run.steps[-1]['step']:,}",
    "samples": lambda run: f"{run.steps[-1]['samples']:,}",
    "tokens": lambda run: f"{run.steps[-1]['tokens']:,}",
    "epochs": lambda run: f"{run.steps[-1]['epochs']:.3g}",
    "seconds": lambda run: f"{run.seconds:.1f}",
    "batch, samples": _batches,
    "steps skipped": lambda run: f"{sum(bool(record.get('skipped')) for record in run.steps):,}",
    "loss, first step": lambda run: format_loss(run.steps[0]["loss"]),
    "loss, last 10%": _recent,
    "evaluation loss": _evaluation,
    "lowest evaluation loss": _lowest,
}


def figures(runs: Sequence[RecordedRun], names: Sequence[str]) -> Table:
    """Return the table of losses, counters and the signals of clauses, with a column for each run."""
    table = _table("", names)
    for label, figure in FIGURES.items():
        table.add_row(label, *(figure(run) for run in runs))
    for label, texts in figure_rows([run.recorded for run in runs]):
        table.add_row(label, *map(Text, texts))
    return table


def _own_table(given: tables.Table) -> Table:
    """Return the table of a clause for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, head in enumerate(given.heads):
        table.add_column(
            head, justify="right" if i else "left", overflow="ellipsis" if i else "fold"
        )
    for row in given.rows:
        table.add_row(*row)
    return table


def _table(head: str, names: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(head)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    return table


def clauses(run: RecordedRun) -> dict[str, str]:
    """Return the clauses of a run as text, by label."""
    return {clause["label"]: _clause(clause) for clause in run.recorded.plan.get("clauses", [])}


def _clause(clause: dict[str, Any]) -> str:
    fields = {name: value for name, value in clause["fields"].items() if value is not None}
    return json.dumps([clause["kind"], clause["construct"], clause.get("targets"), fields])


def differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Return the clauses that differ between runs, with each run's version of the clause, or `-`."""
    written = [clauses(run) for run in runs]
    found = []
    for label in dict.fromkeys(label for one in written for label in one):
        versions = list(dict.fromkeys(one[label] for one in written if label in one))
        if len(versions) > 1 or any(label not in one for one in written):
            marks = [_mark(one.get(label), versions) for one in written]
            found.append((label, marks))
    return found


def _mark(text: str | None, versions: Sequence[str]) -> str:
    if text is None:
        return "-"
    return "yes" if len(versions) == 1 else f"version {versions.index(text) + 1}"


def show(runs: Sequence[RecordedRun], console: Console) -> None:
    """Print the figures of runs side by side, the clauses that differ, and the summary lines of each run."""
    names = _names([run.folder for run in runs])
    console.print(figures(runs, names))
    different = differences(runs) if len(runs) > 1 else []
    if different:
        console.print()
        table = _table("clauses that differ", names)
        for label, marks in different:
            table.add_row(label, *marks)
        console.print(table)
    for run, name in zip(runs, names, strict=True):
        console.print()
        whose = f", {name}" if len(runs) > 1 else ""
        console.print(Text(f"What each clause did{whose}"), style="bold")
        for line in run.summary.get("lines", ["no summary: the run has not ended"]):
            console.print(Text(f"  {line}"), soft_wrap=True)
        if message := run.summary.get("message"):
            console.print(Text(f"{run.reason}: {message}"), soft_wrap=True)
        for line in unread_clauses(run.recorded.plan):
            console.print(Text(line), soft_wrap=True)
        for own in tables_of(run.recorded):
            console.print()
            console.print(_own_table(own))


def _names(folders: Sequence[Path]) -> list[str]:
    """Return names of folders: the parts in which their paths differ."""
    parts = [folder.resolve().parts for folder in folders]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("report")
    def report(
        runs: Annotated[
            list[Path],
            typer.Argument(metavar="RUN...", help="Folders of runs.", exists=True, file_okay=False),
        ],
        plot: Plot = None,
    ) -> None:
        """Summarise finished runs, side by side.

        Prints why each run ended, its losses, what its clauses measured, in total and by layer, and the
        summary of each clause; for several runs also the clauses that differ. `--plot` draws losses,
        learning rates, what the clauses measured, and figures per layer into a file.
        """
        with only_trusted(()):
            _report(runs, plot)


def _report(runs: Sequence[Path], plot: Path | None) -> None:
    found = [RecordedRun(folder) for folder in runs]
    for run in found:
        metrics = run.folder / "metrics.jsonl"
        if not metrics.exists() or not run.steps:
            why = "no step is recorded" if metrics.exists() else "there is no metrics.jsonl"
            raise typer.BadParameter(f"{run.folder} holds no run: {why}", param_hint="RUN")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    show(found, console)
    if plot is not None:
        require_drawable(plot)
        console.print(Text(f"drew {draw_runs(runs, plot)}"), soft_wrap=True)
