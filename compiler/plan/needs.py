"""What a run needs, from its plan alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from trainc.compiler.plan.plan import Plan
from trainc.compiler.plan.plan_tables import PROBES, state_of
from trainc.dsl.values.value_json import from_json
from trainc.runtime.memory.needs import Need, Needs, Of
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion


def needs_of(plan: Plan) -> Needs:
    """Return what a run of the plan needs on the disk, and in memory what its passes need aside."""
    labels = {state_of(row["label"]) for row in plan.clauses if row["kind"] == "optimizer"}
    memory = tuple(_memory(plan, labels))
    state = sum(row["bytes"] for row in plan.memory if row["what"] in labels)
    kept = sum(row["bytes"] for row in plan.memory if row["what"] != PROBES)
    run, length = plan.settings["run"], plan.settings["length"]
    steps = None if length is None else _steps(plan, TimeSpan.from_json(length))
    saves: float | None = 1
    if (every := run.get("checkpoint")) is not None:
        period = _steps(plan, TimeSpan.of(from_json(every)))
        saves = steps / period if steps and period else None
    return Needs(memory, state, memory[0].bytes + kept, run.get("keep", 1), saves, steps)


def _memory(plan: Plan, states: set[str]) -> Iterator[Need]:
    """Yield what is in memory: weights, gradients, and the plan's own rows, among them the optimizers' `states`."""
    weights = (
        math.prod(shape) * getattr(torch, dtype).itemsize
        for _, shape, dtype in plan.model["signature"]
    )
    yield Need("weights", sum(weights), of="weights")
    yield Need("gradients", plan.settings["gradients"], of="trained")
    for row in plan.memory:
        of: Of | None = "trained" if row["what"] in states else None
        yield Need(row["what"], row["bytes"], row.get("sure", True), of)


def _steps(plan: Plan, span: TimeSpan) -> float | None:
    """Return the steps of a time span of the run; None where they are not known before it."""
    names = ("samples_per_step", "tokens_per_sample", "samples_per_epoch")
    units = plan.settings["units"]
    conversion = UnitConversion(
        **{name: units[name] for name in names}, replicas=units.get("replicas", 1)
    )
    try:
        return conversion.convert(span, "steps", RunLength.from_json(plan.settings["length"]))
    except ValueError:
        return None
