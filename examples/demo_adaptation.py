"""The demo's second half: a vision transformer adapts to new classes from few images, with methods and without.

Which methods was found by `benchmarks/demo_search.py`, on other seeds than these.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from examples.demo_runs import EXAMPLES, WITH, WITHOUT, Trained, spec_of, train_spec, versions
from trainc.compiler.model.factories import seeded_model
from trainc.compiler.model.import_path import searching
from trainc.dsl.resolve.spec import Spec
from trainc.runtime.report.student_t import student_t_quantile
from trainc.runtime.storage.saved_weights import read_weights

KNOWN, NAME = "digits_known", "digits_adapt"
SEEDS = (301, 302, 303, 304, 305)
LEVEL = 0.9
FIGURES: Mapping[str, Callable[[Trained], float]] = {
    "accuracy, %": lambda run: 100 * run.last("eval_accuracy"),
    "evaluation loss": lambda run: run.last("eval_loss"),
    "training loss, last 10%": lambda run: run.last_losses(),
    "distance from the start": lambda run: run.distance,
    "seconds": lambda run: run.summary.seconds,
}
Runs = Mapping[str, Sequence[Trained]]


def adapt(
    out: Path, settings: Mapping[str, Mapping[str, str]], seeds: Sequence[int], console: Console
) -> dict[str, list[Trained]]:
    """Learn the known classes, then the new ones from each seed with methods and without; tell how they did."""
    console.rule(Text(f"{KNOWN}: what is known before"), align="left")
    known = train_spec(spec_of(KNOWN, settings.get(KNOWN, {})), out / KNOWN, KNOWN, console)
    found: dict[str, list[Trained]] = {WITH: [], WITHOUT: []}
    for seed in seeds:
        start = out / NAME / f"start-{seed}.safetensors"
        overrides = {"seed": str(seed), "start": json.dumps(start.as_posix())}
        spec = spec_of(NAME, {**overrides, **settings.get(NAME, {})})
        give_new_head(spec, known.folder, start)
        for what, version in versions(spec).items():
            title = f"{NAME}, seed {seed}, {what} methods"
            console.rule(Text(title), align="left")
            run = train_spec(version, out / NAME / f"{what}-{seed}", title, console)
            found[what].append(run)
    console.print()
    console.print(table(found))
    console.print("What the methods did, in its own words, of the first seed:")
    for line in found[WITH][0].summary.lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(Text(verdict(found)), soft_wrap=True)
    console.print()
    return found


def give_new_head(spec: Spec, known: Path, start: Path) -> None:
    """Write the weights of a run with the head that the spec's model begins with: the classes are others."""
    with searching(EXAMPLES / "any.train"):
        fresh = seeded_model(spec).state_dict()
    heads = {name: one for name, one in fresh.items() if name.startswith("head.")}
    start.parent.mkdir(parents=True, exist_ok=True)
    save_file({**read_weights(known), **heads}, start)


def table(found: Runs) -> Table:
    """Return the means over seeds side by side."""
    title = f"{NAME}, means over {len(found[WITH])} seeds"
    rows = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    rows.add_column("")
    for what in found:
        rows.add_column(f"{what} methods", justify="right")
    for label, figure in FIGURES.items():
        means = [fmean(map(figure, runs)) for runs in found.values()]
        rows.add_row(label, *(f"{mean:.{2 if mean > 2 else 4}f}" for mean in means))
    return rows


def verdict(found: Runs) -> str:
    """Return by how much the methods change accuracy and loss, with intervals over seeds, and what they cost."""
    accuracy = gaps(found, lambda run: 100 * run.last("eval_accuracy"))
    loss = gaps(found, lambda run: run.last("eval_loss"))
    seconds = [sum(run.summary.seconds for run in found[what]) for what in (WITH, WITHOUT)]
    return (
        f"With the methods {sum(gap > 0 for gap in accuracy)} of {len(accuracy)} seeds are more accurate on held-out"
        f" images, in points by {in_the_mean(accuracy, 1)}; the loss there changes by {in_the_mean(loss, 2)}; in"
        f" {seconds[0] / seconds[1]:.2f} times the time."
    )


def gaps(found: Runs, figure: Callable[[Trained], float]) -> list[float]:
    """Return how much larger a figure is with the methods, by seed."""
    ours, plain = ([figure(run) for run in found[what]] for what in (WITH, WITHOUT))
    return [one - other for one, other in zip(ours, plain, strict=True)]


def in_the_mean(gaps: Sequence[float], digits: int) -> str:
    """Return a mean, with its interval where there are several numbers."""
    mean = f"{fmean(gaps):.{digits}f}"
    if len(gaps) < 2:
        return mean
    margin = student_t_quantile(LEVEL, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    ends = f"{fmean(gaps) - margin:.{digits}f} to {fmean(gaps) + margin:.{digits}f}"
    return f"{mean} in the mean ({100 * LEVEL:.0f}% interval {ends})"
