"""The demo: pretrain and fine-tune a small GPT, each with its methods and without, and compare.

Runs, tables' numbers and pictures are kept in demo-out/; `trainc report` reads them too.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from trainc.compiler.driver.compile import compile, resolve_spec
from trainc.compiler.driver.hardware import hardware_of, placed
from trainc.compiler.driver.recorded_clauses import shown_signals
from trainc.compiler.driver.train import SPEC, load_weights
from trainc.compiler.model.factories import build_data, seeded_model
from trainc.compiler.model.import_path import searching
from trainc.compiler.program.save import PLAN
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Assign, Clause, Rule
from trainc.dsl.values.value_json import Duration, Name, walk
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.loop import train
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage.jsonl import Record, read_jsonl

EXAMPLES = Path(__file__).resolve().parent
OUT = EXAMPLES.parent / "demo-out"
METHODS = frozenset({"lr", "regularize", "mask", "noise_scale", "observe"})
WITH, FIXED, WITHOUT = "with", "fixed batch, other", "without"
"""The runs of a comparison; each is followed by `methods` where it is named."""


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
        return read_jsonl(self.folder / "metrics.jsonl")


def with_fixed_batch(spec: Spec) -> Spec:
    """Return the spec with the batch that its policy begins with, in every step."""

    def fixed(clause: Clause) -> Clause:
        construct: Any = clause.construct
        if clause.kind != "data" or construct.policy is None:
            return clause
        size = Duration(construct.start_size, "samples")
        return clause.replace(construct=construct.model_copy(update={"batch": size}))

    return Spec(tuple(map(fixed, spec.clauses)), spec.rules, spec.version)


def versions(spec: Spec) -> dict[str, Spec]:
    """Return what is compared: the spec, without its methods, and with a fixed batch alone if it has a policy of it."""
    fixed = with_fixed_batch(spec)
    found = {WITH: spec} | ({} if fixed == spec else {FIXED: fixed})
    return {**found, WITHOUT: without_methods(fixed)}


def folder_of(what: str) -> str:
    """Return the name of the folder of a run."""
    return what.partition(",")[0].replace(" ", "-")


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
    if (folder / "metrics.jsonl").exists():
        shutil.rmtree(folder)
    run, hardware = spec.one("run"), demo_hardware(spec)
    assert run is not None
    with searching(EXAMPLES / "any.train"):
        model = seeded_model(spec)
        if (start := getattr(run.construct, "start", None)) is not None:
            load_weights(model, Path(start), spec)
        program = compile(spec, placed(model, hardware, spec))
        data = build_data(spec)
    program.execution.autocast = hardware.autocast
    length = program.length
    assert length is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    signals = shown_signals(program.plan.to_json())
    display = LiveDisplay(length.amount, length.unit, title=title, signals=signals, console=console)
    texts = {PLAN: json.dumps(program.plan.to_json()), SPEC: json.dumps(spec.to_json())}
    with hardware.products():
        summary = train(program, data, out=folder, display=display, texts=texts, hardware=hardware)
    return Trained(folder, summary, distance(model, before))


def demo_hardware(spec: Spec) -> Hardware:
    """Return what `trainc run` would train on; in place of MPS, where no gradients can be measured, the CPU."""
    found = hardware_of(spec)
    if found.device.type != "mps":
        return found
    return Hardware(
        torch.device("cpu"), about="MPS has no float64, in which gradients are measured"
    )


def distance(model: nn.Module, before: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of the parameters' change since `before`."""
    apart = [p.detach() - before[name] for name, p in model.named_parameters()]
    return math.hypot(*(float(tensor.norm()) for tensor in apart))


def pair(
    name: str, overrides: Mapping[str, str], out: Path, console: Console
) -> dict[str, Trained]:
    """Train a spec of this folder with its methods, with a fixed batch and without them, and tell how each did."""
    spec, _ = resolve_spec(EXAMPLES / f"{name}.train", overrides)
    found: dict[str, Trained] = {}
    for what, version in versions(spec).items():
        title = f"{name}, {what} methods"
        console.rule(Text(title), align="left")
        found[what] = train_spec(version, out / name / folder_of(what), title, console)
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
    found: float | None = record.get("data_loss", record.get("loss"))
    return found


def last_losses(records: Sequence[Record], share: float = 0.1) -> float:
    """Return the mean training loss over the last part of a run, weighted by samples."""
    steps = [record for record in records if "loss" in record]
    begin = (1 - share) * steps[-1]["samples"]
    kept = [record for record in steps if record["samples"] > begin]
    total = sum(record["batch"] for record in kept)
    return float(sum((task_loss(r) or 0.0) * r["batch"] for r in kept) / total)


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
    """Train both pairs and draw them; `settings` replaces `let` values by spec name."""
    begin = time.perf_counter()
    pairs = {"pretrain": pair("pretrain", settings.get("pretrain", {}), out, console)}
    start = {"start": f'"{(out / "pretrain" / folder_of(WITH)).as_posix()}"'}
    pairs["finetune"] = pair("finetune", start | dict(settings.get("finetune", {})), out, console)
    if find_spec("matplotlib") is None:
        console.print("no pictures: they need matplotlib, `pip install matplotlib`")
    else:
        for file in import_module("examples.demo_pictures").draw(pairs, out):
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
