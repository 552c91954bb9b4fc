"""The plan's tables of the step, of memory and of settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.effects import step_order
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import MeasuredSite
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.plan.plan import Row
from trainc.compiler.plan.replays import replayed_text
from trainc.compiler.plan.schedule_tables import batch_row
from trainc.dsl.reading.construct import PHASES
from trainc.dsl.text.vocabulary import ROLES

EMBEDDING = ROLES[2]
PROBES = "probes"
"""What the plan calls the statistics of examples that a step keeps."""


def state_of(optimizer: str) -> str:
    """Return what the plan calls the state of an optimizer."""
    return f"{optimizer}: optimizer state"


def step_rows(binding: Binding) -> list[Row]:
    """Return the step as a table of phase, clause, action, reads, writes and how often."""
    rows = [
        _step_row("forward", "model", "forward", ("params", "inputs"), ("forward",), _MICRO),
        _step_row("backward", "model", "backward", ("loss",), ("gradient", "probe"), _MICRO),
    ]
    for c, e in step_order(binding.active):
        if c.construct.performs(e):
            limits = {} if e.lasting else {"until": c.stop, "every": c.every}
            times = _times({"from": c.start} | limits)
            action = c.construct.describe(e)
            rows.append(_step_row(e.phase, c.label, action, e.reads, e.writes, times))
    for i, rule in enumerate(binding.spec.rules):
        actions: Any = rule.actions
        writes = [getattr(action, "target", None) or _written(action) for action in actions]
        condition = f"when {rule.condition}"
        waits = _times({"held for": rule.hold, "cooldown": rule.cooldown}, ", ")
        rows.append(_step_row("batch", f"rule {i + 1}", condition, ("signals",), writes, waits))
    return sorted(rows, key=lambda row: row["phase"])


def _written(action: Any) -> str:
    """Return what a rule does besides setting a number: `stop`, `freeze "blocks.*"`."""
    named = action.argument is not None and action.verb != "warn"
    return f"{action.verb} {action.argument}" if named else str(action.verb)


_MICRO = "every micro-batch"


def _step_row(
    phase: str, clause: str, action: str, reads: Iterable[str], writes: Iterable[str], every: str
) -> Row:
    return {
        "phase": PHASES.index(phase) + 1, "name": phase, "clause": clause, "action": action,
        "reads": list(reads), "writes": list(writes), "every": every,
    }  # fmt: skip


def _times(times: Mapping[str, object], separator: str = " ") -> str:
    given = (f"{word} {time}" for word, time in times.items() if time is not None)
    return separator.join(given) or "every step"


def memory_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return what the program holds besides weights and gradients, in bytes."""
    guessed = {
        state_of(part.label)
        for part in method.optimizers
        if not getattr(part.construct, "moments_known", False)  # such as one from another package
    }
    return [
        {"what": what, "bytes": count, **({"sure": False} if what in guessed else {})}
        for what, count in _memory(binding, method)
        if count
    ]


def _memory(binding: Binding, method: LoweredMethod) -> Iterator[tuple[str, int]]:
    inventory, masks = binding.inventory, method.masks
    held = {name: one.held for one in method.paused for name in one.names}
    for part in method.optimizers:
        sizes = [
            (masks[name].values.nbytes if name in masks else inventory.parameter[name].bytes)
            * held.get(name, 1)
            for name in part.targets
            if name not in method.frozen
        ]
        entries = sum(inventory.parameter[n].numel for n in part.targets if n not in method.frozen)
        together = getattr(part.construct, "state_bytes", None)  # where it is no multiple of sizes
        known = (
            round(part.construct.moments * sum(sizes)) if together is None else together(entries)
        )
        yield state_of(part.label), known
    for action in method.actions:
        yield action.name, action.memory()
    constants = sum(t.numel() * t.element_size() for t in method.tensors.values())
    yield "constants of loss terms", constants
    if batch := binding.units.samples_per_step:
        numbers = sum(_probe_size(site, inventory) for site in method.rewrite.measured)
        yield PROBES, int(batch) * numbers * 4


def _probe_size(site: MeasuredSite, inventory: Inventory) -> int:
    """Return the numbers that a site's probe holds for one example."""
    if not site.per_example_gradients:
        return len(site.parameters)
    numel = 0 if site.weight is None else inventory.parameter[site.weight].numel
    return numel * len(site.parameters)


def _gradients(binding: Binding, method: LoweredMethod) -> int:
    """Return the bytes of the gradients of a step, of masked parameters those that are kept."""
    masks, sizes = method.masks, binding.inventory.parameter
    trained = {n for part in method.optimizers for n in part.targets} - method.frozen
    return sum(
        masks[name].values.nbytes if name in masks and masks[name].separate else sizes[name].bytes
        for name in trained
    )


def _sizes(binding: Binding) -> Row:
    """Return the number of weights, and of those that are no embedding, as laws of scale count them."""
    counts = [(prod(p.shape), EMBEDDING in p.roles) for p in binding.inventory.parameters]
    return {
        "weights": sum(count for count, _ in counts),
        "without_embeddings": sum(count for count, embedding in counts if not embedding),
    }


def settings_row(binding: Binding, method: LoweredMethod) -> Row:
    """Return the length, settings, units and gradients of the run, and what sets the batch where it changes."""
    run, data, units = binding.one("run"), binding.one("data"), binding.units
    divided = _division(binding)
    return {
        "length": binding.length.to_json() if binding.length else None,
        "run": run.construct.model_dump(mode="json") if run else {},
        "units": {
            "samples_per_step": units.samples_per_step,
            "tokens_per_sample": units.tokens_per_sample,
            "samples_per_epoch": units.samples_per_epoch,
            **({"replicas": units.replicas} if units.replicas > 1 else {}),
            **({"changing": True} if units.changing else {}),
        },
        **({"batch": batch_row(binding, method)} if units.changing else {}),
        "micro_batch": data.construct.micro_size if data else None,  # type: ignore[attr-defined]
        "gradients": _gradients(binding, method),
        "sizes": _sizes(binding),
        **({"division": divided} if divided else {}),
        **({"compiled": _compiled_part(method)} if method.compiled else {}),
        **({"graphs": replayed_text(method)} if method.replayed else {}),
        **({"checkpointed": again} if (again := method.rewrite.checkpointed) else {}),
        **({"processes": dict(apart)} if (apart := method.process_dependence) else {}),
        **({"replicas": text} if (text := _replicas(binding)) else {}),
    }


def _replicas(binding: Binding) -> str | None:
    """Return what a clause means for a run by which each process trains a replica of its own; None without one."""
    clause = next((c for c in binding.active if c.construct.joins == "apart"), None)
    size, count = binding.units.samples_per_step, binding.units.replicas
    if clause is None or size is None:
        return None
    many = f"{count} processes" if count > 1 else "R processes"
    all_of = f"{size * count:g}" if count > 1 else f"R x {size:g}"
    return (
        f"`{clause.label}`: with {many} each trains a replica of its own, and a step takes {size:g} samples in each,"
        f" {all_of} together; an epoch is one pass over the data by all of them"
    )


def _compiled_part(method: LoweredMethod) -> str:
    """Return what is compiled where the model can be captured: what runs the steps."""
    if method.rewrite.modules_only is not None:
        return "the modules"
    if method.rewrite:
        return "the step graph"
    return "the step graph on CUDA, elsewhere the modules" if method.replayed else "the modules"


def _division(binding: Binding) -> dict[str, str]:
    """Return why clauses depend on how a step is divided into micro-batches, by label, where the spec divides it."""
    data: Any = binding.one("data")
    if data is None or (
        data.construct.micro_size == data.construct.start_size
        and not binding.units.changing
        and not data.construct.halves_micro
    ):
        return {}
    return {c.label: reason for c in binding.active if (reason := c.construct.division)}
