"""Runs of the demo: a spec of this folder with its methods and without, trained into folders."""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from trainc.compiler.driver.adaptation import load_weights
from trainc.compiler.driver.compile import compile, resolve_spec
from trainc.compiler.driver.hardware import hardware_of, placed
from trainc.compiler.driver.recorded_clauses import shown_signals
from trainc.compiler.driver.train import SPEC
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
METHODS = frozenset({"lr", "regularize", "perturb", "mask", "noise_scale", "observe"})
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

    def last(self, name: str) -> float:
        """Return the last value of a figure that was measured."""
        return float([record[name] for record in self.records if name in record][-1])

    def last_losses(self, share: float = 0.1) -> float:
        """Return the mean training loss over the last part of the run, weighted by samples."""
        steps = [record for record in self.records if "loss" in record]
        begin = (1 - share) * steps[-1]["samples"]
        kept = [record for record in steps if record["samples"] > begin]
        total = sum(record["batch"] for record in kept)
        return float(sum((task_loss(r) or 0.0) * r["batch"] for r in kept) / total)


def task_loss(record: Record) -> float | None:
    """Return the loss on the targets alone, without what methods add to it."""
    found: float | None = record.get("data_loss", record.get("loss"))
    return found


def spec_of(name: str, overrides: Mapping[str, str] | None = None) -> Spec:
    """Read a spec of this folder; `overrides` replaces `let` values."""
    spec, _ = resolve_spec(EXAMPLES / f"{name}.train", overrides)
    return spec


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


def train_spec(spec: Spec, folder: Path, title: str, console: Console | None) -> Trained:
    """Train one spec into a folder, in place of what the demo left there before; shown where there is a console.

    Raises SystemExit where the run did not finish.
    """
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
    display = None
    if console is not None:
        display = LiveDisplay(
            length.amount, length.unit, title=title, signals=signals, console=console
        )
    texts = {PLAN: json.dumps(program.plan.to_json()), SPEC: json.dumps(spec.to_json())}
    with hardware.products():
        summary = train(program, data, out=folder, display=display, texts=texts, hardware=hardware)
    if summary.exit_code:
        print(summary.message)
        sys.exit(summary.exit_code)
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
