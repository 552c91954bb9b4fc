"""How plans and programs show themselves: in a line, in a few lines of text, and by their public names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainc.compiler.public_names import PublicNames
from trainc.runtime.schedule.time_span import TimeSpan

if TYPE_CHECKING:
    from torch import nn

    from trainc.compiler.plan.plan import Plan
    from trainc.runtime.schedule.clock import Clock, RunLength


class ShownProgram(PublicNames):
    """Base of `Program`, which has these attributes."""

    internal = frozenset({"internal", "execution"})
    module: nn.Module
    plan: Plan
    clock: Clock
    length: RunLength | None

    def __repr__(self) -> str:
        length = f" of {self.length}" if self.length else ""
        labels = ", ".join(clause["label"] for clause in self.plan.clauses)
        done = f"after {counted(self.clock.steps, 'step')}{length}"
        return f"Program({type(self.module).__name__}: {labels}; {done})"


def plan_text(plan: Plan) -> str:
    """Return what a plan is for, its clauses with the number of their targets, its phases and rewritten layers."""
    return "\n".join(_lines(plan))


def counted(number: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def hardware_text(plan: Plan) -> str | None:
    """Return the device and precision that a run of the plan asks for; None without a `run` clause."""
    run = plan.settings["run"]
    if "device" not in run:
        return None
    part = plan.settings.get("compiled")
    compiled = f"; {run['compile']} compiles {part}" if part else ""
    graphs = f"; CUDA graphs {replayed}" if (replayed := plan.settings.get("graphs")) else ""
    products = f", {run['matmul']} precision of float32 products" if run["matmul"] else ""
    return f"`trainc run`: device {run['device']}, precision {run['precision']}{products}{compiled}{graphs}"


def checkpoints_text(plan: Plan) -> str | None:
    """Return which modules are activation checkpoints; None where none is."""
    if not (again := plan.settings.get("checkpointed")):
        return None
    named = ", ".join(f"`{name}`" for name in again)
    return f"only inputs are kept of {named}, which run again in the backward pass"


def _lines(plan: Plan) -> Iterator[str]:
    length = plan.settings.get("length")
    span = f" for {length['amount']:g} {length['unit']}" if length else ""
    yield f"{plan!r}{span}"
    if (line := hardware_text(plan)) is not None:
        yield line
    if (line := checkpoints_text(plan)) is not None:
        yield line
    if (replicas := plan.settings.get("replicas")) is not None:
        yield replicas
    for name, reason in plan.settings.get("processes", {}).items():
        yield f"`{name}` depends on the number of processes: it {reason}"
    yield "clauses"
    for clause in plan.clauses:
        yield f"  {_clause(clause)}"
    yield "step"
    for action in plan.steps:
        yield f"  {action['name']:10} {action['clause']}: {action['action']}, {action['every']}"
    if plan.sites:
        yield "layers that call trainc's operators"
    for site in plan.sites:
        yield f"  {site['site'] or 'the model'}: {site['operator']}"
    for warning in plan.warnings:
        yield f"warning: {warning.message}"


def _clause(clause: dict[str, Any]) -> str:
    """Return a clause's name, how many modules or parameters it selects, and when it acts."""
    title = clause["kind"]
    title += "" if clause["construct"] == clause["kind"] else f" {clause['construct']}"
    title += "" if clause["label"] == clause["construct"] else f" as {clause['label']}"
    if clause["dropped"]:
        return f"{title}: left out, {clause['dropped']}"
    times = {"from": clause["start"], "until": clause["stop"], "every": clause["every"]}
    when = "".join(
        f" {word} {TimeSpan(**time)}" for word, time in times.items() if time is not None
    )
    targets = clause["targets"]
    return f"{title}{when}" + (f": {counted(len(targets), 'target')}" if targets else "")
