"""The demo: pretrain and fine-tune a small GPT, each with its methods and without, and compare.

Runs, tables' numbers and pictures are kept in demo-out/; `trainc report` reads them too.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from trainc.compiler.compile import build_data, compile, read, seeded_model
from trainc.compiler.imports import searching
from trainc.compiler.train import PLAN, SPEC, load_weights
from trainc.dsl.spec import Assign, Rule, Spec
from trainc.dsl.values import Name, walk
from trainc.runtime.display import Display
from trainc.runtime.loop import train
from trainc.runtime.metrics import Record
from trainc.runtime.metrics import read as read_records
from trainc.runtime.plots import COLORS, STYLE, smooth
from trainc.runtime.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = Path(__file__).resolve().parent
OUT = EXAMPLES.parent / "demo-out"
METHODS = frozenset({"lr", "regularize", "mask", "noise_scale", "observe"})
WITH, WITHOUT = "with", "without"


@dataclass(frozen=True, slots=True)
class Trained:
    """One finished run: where it is, how it ended, and how far its weights went."""

    folder: Path
    summary: Summary
    distance: float
    """L2 norm of all parameters' change, from the weights the run began with."""

    @property
    def records(self) -> list[Record]:
        """Return what was measured, step by step."""
        return read_records(self.folder / "metrics.jsonl")


def without_methods(spec: Spec) -> Spec:
    """Return the plain run: the spec without methods, and without the rules that name one."""
    kept = [clause for clause in spec.clauses if clause.kind not in METHODS]
    gone = {clause.name for clause in spec.clauses if clause.kind in METHODS}
    rules = [rule for rule in spec.rules if not gone & mentioned(rule)]
    return Spec(tuple(kept), tuple(rules), spec.version)


def mentioned(rule: Rule) -> set[str]:
    """Return the first names of everything a rule reads or sets: `gns` of `gns.error`."""
    assigned = [action for action in rule.actions if isinstance(action, Assign)]
    read_in = [rule.condition, *(action.value for action in assigned)]
    names = [part.id for tree in read_in for part in walk(tree) if isinstance(part, Name)]
    return {name.partition(".")[0] for name in [*names, *(a.target for a in assigned)]}


def train_spec(spec: Spec, folder: Path, title: str, console: Console) -> Trained:
    """Train one spec into a folder, in place of what the demo left there before."""
    shutil.rmtree(folder, ignore_errors=True)
    run = spec.one("run")
    assert run is not None
    with searching(EXAMPLES / "any.train"):
        model = seeded_model(spec)
        if (start := getattr(run.construct, "start", None)) is not None:
            load_weights(model, Path(start), run)
        program = compile(spec, model)
        data = build_data(spec)
    length = program.length
    assert length is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    display = Display(length.amount, length.unit, title=title, console=console)
    texts = {PLAN: json.dumps(program.plan.to_json()), SPEC: json.dumps(spec.to_json())}
    summary = train(program, data, out=folder, display=display, texts=texts)
    return Trained(folder, summary, distance(model, before))


def distance(model: nn.Module, before: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of the parameters' change since `before`."""
    apart = [p.detach() - before[name] for name, p in model.named_parameters()]
    return math.hypot(*(float(tensor.norm()) for tensor in apart))


def pair(
    name: str, overrides: Mapping[str, str], out: Path, console: Console
) -> dict[str, Trained]:
    """Train a spec of this folder with its methods and without them, and tell how both did."""
    spec, _ = read(EXAMPLES / f"{name}.train", overrides)
    found: dict[str, Trained] = {}
    for what, version in ((WITH, spec), (WITHOUT, without_methods(spec))):
        title = f"{name}, {what} methods"
        console.rule(Text(title), align="left")
        found[what] = train_spec(version, out / name / what, title, console)
        if found[what].summary.exit_code:
            console.print(found[what].summary.message)
            sys.exit(found[what].summary.exit_code)
    console.print()
    console.print(table(name, found))
    console.print("What the methods did, in its own words:")
    for line in found[WITH].summary.lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(Text(verdict(found)), soft_wrap=True)
    console.print()
    return found


def task_loss(record: Record) -> float | None:
    """Return the loss on the targets alone, without what methods add to it."""
    found: float | None = record.get("task", record.get("loss"))
    return found


def last_losses(records: Sequence[Record], share: float = 0.1) -> float:
    """Return the mean training loss over the last part of a run, weighted by samples."""
    steps = [record for record in records if "loss" in record]
    begin = (1 - share) * steps[-1]["samples"]
    kept = [record for record in steps if record["samples"] > begin]
    total = sum(record["batch"] for record in kept)
    return float(sum((task_loss(r) or 0.0) * r["batch"] for r in kept) / total)


def table(name: str, found: Mapping[str, Trained]) -> Table:
    """Return both runs' figures side by side."""
    rows = Table(title=name, title_justify="left", box=None, header_style="bold", pad_edge=False)
    rows.add_column("")
    for what in found:
        rows.add_column(f"{what} methods", justify="right")
    columns = list(found.values())
    evaluated = [[r["eval_loss"] for r in one.records if "eval_loss" in r] for one in columns]
    figures: dict[str, list[str]] = {
        "evaluation loss": [f"{values[-1]:.4f}" for values in evaluated],
        "its lowest value": [f"{min(values):.4f}" for values in evaluated],
        "training loss, last 10%": [f"{last_losses(one.records):.4f}" for one in columns],
        "tokens": [f"{one.summary.tokens:,}" for one in columns],
        "steps": [f"{one.summary.steps:,}" for one in columns],
        "seconds": [f"{one.summary.seconds:.1f}" for one in columns],
        "distance from the start": [f"{one.distance:.2f}" for one in columns],
    }
    for label, values in figures.items():
        rows.add_row(label, *values)
    return rows


def verdict(found: Mapping[str, Trained]) -> str:
    """Return which run has the lower evaluation loss, and by how much."""
    ours, plain = (found[what].summary for what in (WITH, WITHOUT))
    assert ours.eval_loss is not None
    assert plain.eval_loss is not None
    gap = ours.eval_loss - plain.eval_loss
    side = "lower" if gap < 0 else "higher"
    times = ours.seconds / plain.seconds
    return (
        f"With the methods the evaluation loss is {abs(gap):.4f} {side} than without, "
        f"in {times:.2f} times the time. One seed each: a small difference may be chance."
    )


def draw(pairs: Mapping[str, Mapping[str, Trained]], out: Path) -> list[Path]:
    """Draw one picture per pair and return their files; needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = []
    for name, found in pairs.items():
        panels = [panel for panel in PANELS if panel.shows(found[WITH].records)]
        with rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
            size = (5.6 * min(2, len(panels)), 3.4 * -(-len(panels) // 2))
            figure = Figure(figsize=size, layout="constrained", dpi=150)
            FigureCanvasAgg(figure)
            for index, panel in enumerate(panels):
                axes = figure.add_subplot(-(-len(panels) // 2), 2, index + 1)
                panel.fill(axes, found)
                axes.set_title(panel.title)
                axes.set_xlabel("thousand tokens")
                axes.margins(x=0.01)
                axes.legend()
            files.append(out / f"{name}.png")
            figure.savefig(files[-1], format="png", facecolor="white")
    return files


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of a picture; drawn where the run with methods measured `needs`."""

    title: str
    needs: str
    fill: Callable[["Axes", Mapping[str, Trained]], None]

    def shows(self, records: Sequence[Record]) -> bool:
        """Say whether there is anything to draw."""
        return any(self.needs in record for record in records)


def over_tokens(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Return thousands of tokens and the values of one quantity."""
    at = {record["step"]: record["tokens"] / 1000 for record in records if "tokens" in record}
    found = [(at[record["step"]], record[name]) for record in records if name in record]
    return [x for x, _ in found], [y for _, y in found]


def draw_losses(axes: "Axes", found: Mapping[str, Trained]) -> None:
    """Draw training losses, smoothed, and evaluation losses of both runs."""
    for (what, one), color in zip(found.items(), COLORS, strict=False):
        records = one.records
        x, y = over_tokens(records, "task" if what == WITH and has(records, "task") else "loss")
        axes.plot(x, smooth(y, len(y) // 25), color=color, alpha=0.45, linewidth=1)
        x, y = over_tokens(records, "eval_loss")
        label = f"{what} methods"
        axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1.6, label=label)
    axes.plot([], [], color="#999999", linewidth=1, label="training, running mean")
    axes.plot([], [], "o-", color="#555555", markersize=4, label="evaluation")
    axes.set_ylabel("cross entropy, nats per byte")


def draw_scale(axes: "Axes", found: Mapping[str, Trained]) -> None:
    """Draw the noise scale with its standard error, the batch, and where the rule waits."""
    records = [record for record in found[WITH].records if "gns" in record]
    x, scale = over_tokens(records, "gns")
    errors = [record["gns.error"] for record in records]
    batch = [record["batch"] for record in records]
    low = [max(s - e, 0.1) for s, e in zip(scale, errors, strict=True)]
    high = [s + e for s, e in zip(scale, errors, strict=True)]
    axes.fill_between(x, low, high, color=COLORS[0], alpha=0.15, linewidth=0)
    axes.plot(x, scale, color=COLORS[0], linewidth=1.4, label="noise scale ± standard error")
    axes.step(x, [2 * b for b in batch], "--", where="post", color="#777777", label="2 * batch")
    axes.step(x, batch, where="post", color=COLORS[1], linewidth=1.8, label="batch")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(0.1, min(scale) / 2))
    axes.set_ylabel("samples")


def draw_factors(axes: "Axes", found: Mapping[str, Trained]) -> None:
    """Draw each layer's factor of the learning rate: a colour per kind, darker towards the head."""
    records = [r for r in found[WITH].records if "temp_balance.scale" in r.get("series", {})]
    layers: list[str] = list(records[0]["series"]["temp_balance.scale"])
    kinds = list(dict.fromkeys(layer.split(".", 2)[2] for layer in layers))
    x = [record["tokens"] / 1000 for record in records]
    end = max(r["tokens"] for r in found[WITH].records if "tokens" in r) / 1000
    for index, layer in enumerate(layers):
        kind = kinds.index(layer.split(".", 2)[2])
        y = [record["series"]["temp_balance.scale"][layer] for record in records]
        label = kinds[kind] if index >= len(layers) - len(kinds) else None
        strength = 0.35 + 0.65 * (index + 1) / len(layers)
        color = COLORS[kind % len(COLORS)]
        axes.step([*x, end], [*y, y[-1]], where="post", color=color, alpha=strength, label=label)
    axes.set_ylabel("factor")


def draw_norm(axes: "Axes", found: Mapping[str, Trained]) -> None:
    """Draw the norm of the selected weights."""
    x, y = over_tokens(found[WITH].records, "norm_growth.norm")
    axes.plot(x, y, color=COLORS[0], linewidth=1.6, label="L2 norm, with methods")


def draw_consistency(axes: "Axes", found: Mapping[str, Trained]) -> None:
    """Draw how far the two noisy views are apart."""
    x, y = over_tokens(found[WITH].records, "consistency")
    axes.plot(x, y, color=COLORS[0], alpha=0.25, linewidth=0.7)
    axes.plot(x, smooth(y, len(y) // 15), color=COLORS[0], linewidth=1.6, label="running mean")
    axes.set_ylabel("squared distance of the logits")
    axes.set_ylim(bottom=0)


def draw_distance(axes: "Axes", found: Mapping[str, Trained]) -> None:
    """Draw how far the selected weights went from where they began."""
    x, y = over_tokens(found[WITH].records, "norm_growth.distance")
    axes.plot(x, y, color=COLORS[0], linewidth=1.6, label="with methods")
    plain = found[WITHOUT]
    end = [plain.summary.tokens / 1000]
    axes.plot(end, [plain.distance], "o", color=COLORS[1], label="without, all weights, at the end")
    axes.set_ylabel("L2 distance")
    axes.set_ylim(bottom=0)


def has(records: Sequence[Record], name: str) -> bool:
    """Say whether any step measured a quantity."""
    return any(name in record for record in records)


PANELS = (
    Panel("Loss", "loss", draw_losses),
    Panel("Noise scale and batch", "gns", draw_scale),
    Panel("Factor of the learning rate, by layer", "temp_balance.spread", draw_factors),
    Panel("Norm of the blocks' matrices", "norm_growth.norm", draw_norm),
    Panel("Distance of the two noisy views", "consistency", draw_consistency),
    Panel("Distance from the pretrained weights", "norm_growth.distance", draw_distance),
)


def demo(out: Path, settings: Mapping[str, Mapping[str, str]], console: Console) -> None:
    """Train both pairs and draw them; `settings` replaces `let` values by spec name."""
    begin = time.perf_counter()
    pairs = {"pretrain": pair("pretrain", settings.get("pretrain", {}), out, console)}
    start = {"start": f'"{(out / "pretrain" / WITH).as_posix()}"'}
    pairs["finetune"] = pair("finetune", start | dict(settings.get("finetune", {})), out, console)
    try:
        for file in draw(pairs, out):
            console.print(Text(f"drew {file}"), soft_wrap=True)
    except ImportError:
        console.print("no pictures: they need matplotlib, `pip install trainc[plots]`")
    console.print(f"{time.perf_counter() - begin:.0f} seconds in all")


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (%(default)s)")
    demo(parser.parse_args().out, {}, Console(highlight=False))


if __name__ == "__main__":
    main()
