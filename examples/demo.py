"""The demo: pretrain a small GPT, and adapt a small ViT, each with methods and without, and compare.

Runs, tables' numbers and pictures are kept in demo-out/; `trainc report` reads them too.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
if find_spec("examples") is None:  # `python -P` leaves the checkout out
    sys.path.append(str(ROOT))

from examples.demo_adaptation import SEEDS, adapt  # noqa: E402
from examples.demo_runs import (  # noqa: E402
    FIXED,
    WITH,
    WITHOUT,
    Trained,
    folder_of,
    spec_of,
    train_spec,
    versions,
)

OUT = ROOT / "demo-out"


def pair(
    name: str, overrides: Mapping[str, str], out: Path, console: Console
) -> dict[str, Trained]:
    """Train a spec of this folder with its methods, with a fixed batch and without them, and tell how each did."""
    found: dict[str, Trained] = {}
    for what, version in versions(spec_of(name, overrides)).items():
        title = f"{name}, {what} methods"
        console.rule(Text(title), align="left")
        found[what] = train_spec(version, out / name / folder_of(what), title, console)
    console.print()
    console.print(table(name, found))
    console.print("What the methods did, in its own words:")
    for line in found[WITH].summary.lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(Text(verdict(found)), soft_wrap=True)
    console.print()
    return found


def table(name: str, found: Mapping[str, Trained]) -> Table:
    """Return the figures of the runs side by side."""
    rows = Table(title=name, title_justify="left", box=None, header_style="bold", pad_edge=False)
    rows.add_column("")
    for what in found:
        rows.add_column(f"{what} methods", justify="right")
    columns = list(found.values())
    evaluated = [[r["eval_loss"] for r in one.records if "eval_loss" in r] for one in columns]
    figures: dict[str, list[str]] = {
        "evaluation loss": [f"{values[-1]:.4f}" for values in evaluated],
        "its lowest value": [f"{min(values):.4f}" for values in evaluated],
        "training loss, last 10%": [f"{one.last_losses():.4f}" for one in columns],
        "tokens": [f"{one.summary.tokens:,}" for one in columns],
        "steps": [f"{one.summary.steps:,}" for one in columns],
        "seconds": [f"{one.summary.seconds:.1f}" for one in columns],
        "distance from the start": [f"{one.distance:.2f}" for one in columns],
    }
    for label, values in figures.items():
        rows.add_row(label, *values)
    return rows


def verdict(found: Mapping[str, Trained]) -> str:
    """Return which run has the lower evaluation loss at the end and at best, and what it costs."""
    evaluated = {
        what: [record["eval_loss"] for record in one.records if "eval_loss" in record]
        for what, one in found.items()
    }
    end = evaluated[WITH][-1] - evaluated[WITHOUT][-1]
    best = min(evaluated[WITH]) - min(evaluated[WITHOUT])
    times = found[WITH].summary.seconds / found[WITHOUT].summary.seconds
    told = (
        f"With the methods the evaluation loss is {_apart(end)} than without at the end and "
        f"{_apart(best)} at its lowest, in {times:.2f} times the time. "
    )
    if FIXED in found:
        ours, fixed = found[WITH].summary, found[FIXED].summary
        gap = evaluated[WITH][-1] - evaluated[FIXED][-1]
        told += (
            f"The batch that follows its policy took {ours.steps:,} steps and the fixed one {fixed.steps:,} for the "
            f"same tokens, and its evaluation loss is {_apart(gap)} at the end. "
        )
    return told + "One seed each: a small difference may be chance."


def _apart(gap: float) -> str:
    return f"{abs(gap):.4f} {'lower' if gap < 0 else 'higher'}"


def demo(out: Path, settings: Mapping[str, Mapping[str, str]], console: Console) -> None:
    """Train both halves and draw them; `settings` replaces `let` values by spec name."""
    begin = time.perf_counter()
    pretrained = pair("pretrain", settings.get("pretrain", {}), out, console)
    adapted = adapt(out, settings, SEEDS, console)
    if find_spec("matplotlib") is None:
        console.print("no pictures: they need matplotlib, `pip install matplotlib`")
    else:
        pictures = import_module("examples.demo_pictures")
        for file in (pictures.draw(pretrained, out), pictures.draw_adaptation(adapted, out)):
            console.print(Text(f"drew {file}"), soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} seconds in all")


def main() -> None:
    """Run the demo as the command line says."""
    # The models are small, and on a busy machine threads that wait for each other cost far more
    # than they save; and the figures come out alike whatever the number of cores.
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (%(default)s)")
    demo(parser.parse_args().out, {}, Console(highlight=False))


if __name__ == "__main__":
    main()
