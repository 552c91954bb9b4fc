"""The plan's tables, read off a binding and the parts that lowering made of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.effects import step_order
from trainc.compiler.constructs.data._batch_policy import row as batch_row
from trainc.dsl.reading.construct import PHASES
from trainc.runtime.schedule.clock import Clock

if TYPE_CHECKING:
    from trainc.compiler.bind.binding import Binding
    from trainc.compiler.method.lowered_method import LoweredMethod
    from trainc.compiler.method.sites import MeasuredSite
    from trainc.compiler.model.inventory import Inventory

Row = dict[str, Any]


def parameter_rows(binding: Binding, parts: LoweredMethod) -> list[Row]:
    """Return one row per parameter: the exact cover."""
    optimizer = {n: part for part in parts.optimizers for n in part.targets}
    touching = [
        c
        for c in binding.clauses
        if c.dropped is None and c.kind not in ("optimizer", "lr", "mask")
    ]
    rows = []
    for p in binding.inventory.parameters:
        part = optimizer.get(p.name)
        trained = part is not None and p.name not in parts.frozen
        compact = parts.compacts.get(p.name)
        rows.append(
            {
                "name": p.name,
                "shape": list(p.shape),
                "aliases": list(p.aliases),
                "depth": round(p.place.depth, 4),
                "optimizer": part.label if part is not None and trained else None,
                "decay": part.decay[p.name] if part is not None and trained else None,
                "lr_factors": [s.policy for s in parts.lr_factors.get(p.name, ())]
                if trained
                else [],
                "mask": f"{compact.values.numel()} of {p.numel}" if compact else None,
                "clauses": [
                    c.label for c in touching if p.name in c.targets or p.module in c.targets
                ],
            }
        )
    return rows


def step_rows(binding: Binding) -> list[Row]:
    """Return the step as a table of phase, clause, action, reads, writes and how often."""
    active = [c for c in binding.clauses if c.dropped is None]
    rows = [
        _step_row(PHASES.index(e.phase), c.label, c.construct.told(e), e.reads, e.writes, _every(c))
        for c, e in step_order(active)
        if c.construct.performs(e)
    ]
    rows += [
        _step_row(
            0,
            f"rule {i + 1}",
            f"when {rule.condition}",
            ("signals",),
            _rule_writes(rule),
            _waits(rule),
        )
        for i, rule in enumerate(binding.spec.rules)
    ]
    rows[:0] = [
        _step_row(3, "model", "forward", ("params", "inputs"), ("forward",), "every micro-batch"),
        _step_row(4, "model", "backward", ("loss",), ("gradient", "probe"), "every micro-batch"),
    ]
    return sorted(rows, key=lambda row: row["phase"])


def _step_row(phase: int, clause: str, action: str, reads: Any, writes: Any, every: str) -> Row:
    return {
        "phase": phase + 1, "name": PHASES[phase], "clause": clause, "action": action,
        "reads": list(reads), "writes": list(writes), "every": every,
    }  # fmt: skip


def _every(clause: BoundClause) -> str:
    from trainc.runtime.schedule.clock import Duration

    said = [
        f"{word} {Duration.from_json(bound)}"
        for word, bound in (("from", clause.start), ("until", clause.stop), ("every", clause.every))
        if bound is not None
    ]
    return " ".join(said) or "every step"


def _waits(rule: Any) -> str:
    waits = ((f"held for {rule.hold}", rule.hold), (f"cooldown {rule.cooldown}", rule.cooldown))
    return ", ".join(text for text, wait in waits if wait is not None) or "every step"


def _rule_writes(rule: Any) -> list[str]:
    return [getattr(action, "target", None) or action.verb for action in rule.actions]


def schedule_rows(binding: Binding, parts: LoweredMethod) -> list[Row]:
    """Return every scheduled number at 21 points of the run, with the clock in all units."""
    from trainc.compiler.constructs.data._batch_policy import counters, ramp

    if binding.length is None:
        return []
    rows = []
    batch = ramp(parts.actions)
    named = [(f"{part.label} lr", part.base) for part in parts.optimizers]
    named += list(parts.scalars.items())
    if batch is not None:
        named.append(("batch", batch.at))
    percents = range(0, 101, 5)
    moments = counters(batch, binding.units, binding.length, [p / 100 for p in percents])
    for percent, found in zip(percents, moments, strict=True):
        clock = Clock(samples_per_epoch=int(binding.units.samples_per_epoch or 0) or None)
        for unit in ("steps", "samples", "tokens", "seconds"):
            setattr(clock, unit, found[unit] or 0)
        rows.append(
            {"percent": percent, **found, "values": {name: at(clock) for name, at in named}}
        )
    return rows


def memory_rows(binding: Binding, parts: LoweredMethod) -> list[Row]:
    """Return what the program holds beyond weights and gradients, in bytes."""
    rows = [{"what": what, "bytes": count} for what, count in _memory(binding, parts) if count]
    return rows


def _memory(binding: Binding, parts: LoweredMethod) -> Iterator[tuple[str, int]]:
    inventory = binding.inventory
    for part in parts.optimizers:
        total = 0
        for name in part.targets:
            if name in parts.frozen:
                continue
            compact = parts.compacts.get(name)
            size = compact.values.numel() * 4 if compact else inventory.parameter[name].bytes
            total += part.construct.moments * size
        yield f"{part.label}: optimizer state", total
    for action in parts.actions:
        yield action.name, action.memory()
    yield (
        "constants of loss terms",
        sum(t.numel() * t.element_size() for t in parts.tensors.values()),
    )
    batch = binding.units.samples_per_step
    if parts.rewrite.measured and batch:
        numbers = sum(
            (_numel(site, inventory) if site.wide else 1) * len(site.parameters)
            for site in parts.rewrite.measured
        )
        yield "probes", int(batch) * numbers * 4


def _numel(site: MeasuredSite, inventory: Inventory) -> int:
    return 0 if site.weight is None else inventory.parameter[site.weight].numel


def settings_row(binding: Binding) -> Row:
    """Return units and run settings: what the loop needs of the spec."""
    run, data = binding.one("run"), binding.one("data")
    fields = run.construct.model_dump(mode="json") if run else {}
    return {
        "length": binding.length.to_json() if binding.length else None,
        "run": fields,
        "units": {
            "samples_per_step": binding.units.samples_per_step,
            "tokens_per_sample": binding.units.tokens_per_sample,
            "samples_per_epoch": binding.units.samples_per_epoch,
            **({"changing": True} if binding.units.changing else {}),
        },
        **({"batch": batch_row(binding)} if binding.units.changing else {}),
        "micro": data.construct.micro_size if data else None,  # type: ignore[attr-defined]
    }
