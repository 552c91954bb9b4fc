"""Print a plan as tables."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainc.compiler.plan.needs import needs_of
from trainc.compiler.plan.plan import Plan, Row
from trainc.compiler.plan.shown import checkpoints_text, hardware_text
from trainc.runtime.memory.needs import format_bytes

ROWS = 40
"""The largest number of rows of a table without `--full`."""
PARTS = 3
"""The largest number of parts of a weight that are all named."""
SCHEDULES = 4
"""The largest number of scheduled numbers side by side without `--full`."""
WIDTH = 132
"""The smallest width if the output is not a terminal."""


def print_plan(plan: Plan, full: bool) -> None:
    """Print a plan. Unless `full`, similar layers share a row and long tables are cut in the middle."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    limit = 10**9 if full else ROWS
    total = sum(math.prod(row["shape"]) for row in plan.parameters)
    console.print(
        f"[bold]{plan.model['type']}[/]: {len(plan.parameters)} parameters with {total:,} entries"
    )
    for line in (hardware_text(plan), checkpoints_text(plan)):
        if line is not None:
            console.print(line)
    for clause in plan.clauses:
        if clause["dropped"]:
            console.print(
                f"not in the program: {clause['kind']} {clause['construct']} ({clause['dropped']})"
            )
    console.print()

    def table(title: str, columns: str, rows: Sequence[Sequence[str]]) -> None:
        _print_table(console, title, columns.split(", "), rows, limit)

    columns = "name, count, shape, depth, level, optimizer, learning rate, decay, learning rate factors, mask, clauses"
    table("Parameters", columns, _parameters(plan.parameters, full))
    shares = [
        (r["clause"], r["what"], str(r["parameters"]), f"{r['entries']:,}", f"{r['share']:.1%}")
        for r in plan.shares
    ]
    table("What each clause reaches", "clause, what, parameters, entries, of what trains", shares)
    table("What is measured", "clause, weight, count, parts, sizes, why", _measured(plan, full))
    actions = [
        (f"{r['phase']} {r['name']}", r["clause"], r["action"], _join(r["reads"]), _join(r["writes"]), r["every"])
        for r in plan.steps
    ]  # fmt: skip
    table("Actions of a step", "phase, clause, action, reads, writes, when", actions)
    _print_batch(console, plan.settings.get("batch"))
    for clause, reason in plan.settings.get("division", {}).items():
        console.print(f"{clause}: depends on how a step is divided into micro-batches: {reason}\n")
    if (replicas := plan.settings.get("replicas")) is not None:
        console.print(f"Under torchrun, {replicas}\n")
    apart = [(name, f"it {reason}") for name, reason in plan.settings.get("processes", {}).items()]
    table("What depends on the number of processes", "module, why", apart)
    _print_schedules(console, plan, full)
    sites = _group_rows(plan.sites, "site", ("operator", "pass", "executor"), full)
    rows = [(name, count, r["operator"], r["pass"], r["executor"]) for name, count, r, _ in sites]
    table("Rewritten layers", "site, count, operator, pass, executor", rows)
    kernels = [(k["operator"], k["implementation"], k["reason"] or "") for k in plan.kernels]
    table("Kernels", "operator, implementation, why not Triton", kernels)
    memory = [(m["what"], format_bytes(m["bytes"])) for m in plan.memory]
    table("Memory besides weights and gradients", "what, size", memory)
    if plan.settings["length"] is not None:
        needs = needs_of(plan)
        console.print(f"A run takes, of memory, {needs.memory_text()}")
        console.print(f"A run takes, of disk, {needs.disk_text()}\n")
    console.print(f"plan {plan.hash[:16]}  spec {plan.fingerprint[:16]}")


def _parameters(rows: Sequence[Row], full: bool) -> list[Sequence[str]]:
    keys = ("shape", "optimizer", "lr", "decay", "decay_factors", "lr_factors", "mask", "clauses")
    return [
        (
            name,
            count,
            "x".join(map(str, p["shape"])),
            f"{p['depth']:.2f}"
            if p["depth"] == last["depth"]
            else f"{p['depth']:.2f}..{last['depth']:.2f}",
            str(p["level"]) if p["level"] == last["level"] else f"{p['level']}..{last['level']}",
            p["optimizer"] or "frozen",
            p["lr"] or "",
            _decay(p),
            ", ".join(map(_lr_factor, *(_factors(one) for one in (p, last)))),
            p["mask"] or "",
            ", ".join(p["clauses"]),
        )
        for name, count, p, last in _group_rows(rows, "name", keys, full)
    ]


def _measured(plan: Plan, full: bool) -> list[Sequence[str]]:
    keys = ("clause", "parts", "sizes", "reason")
    return [
        (
            row["clause"],
            name,
            count,
            _listed(row["parts"]),
            _listed(dict.fromkeys(row["sizes"])),
            row["reason"],
        )
        for name, count, row, _ in _group_rows(plan.measured, "weight", keys, full)
    ]


def _listed(words: Collection[str]) -> str:
    """Return a few words with commas, and the first and the last of many."""
    found = [*words]
    return ", ".join(found) if len(found) <= PARTS else f"{found[0]} .. {found[-1]}"


def _decay(row: Row) -> str:
    """Return the weight decay of a parameter, and the factors on it."""
    decay = row["decay"]
    if decay is None:
        return ""
    factors = zip(row["decay_factors"], row["decay_values"], strict=True)
    texts = (policy if value is None else f"{policy} {value}" for policy, value in factors)
    return ", ".join([decay if isinstance(decay, str) else f"{decay:g}", *texts])


def _factors(row: Row) -> list[tuple[str, str, float | str | None]]:
    """Return the factors of a parameter: the policy, its unit, and the factor if constant, or its limits if known."""
    return list(zip(row["lr_factors"], row["lr_units"], row["lr_values"], strict=True))


def _lr_factor(
    first: tuple[str, str, float | str | None], last: tuple[str, str, float | str | None]
) -> str:
    """Return a policy, its units and its factors or their limits, for one parameter, or the first and last of some."""
    policy, unit, value = first
    text = policy
    word, _, number = last[1].partition(" ")
    if word in ("level", "block") and unit.startswith(f"{word} "):
        text += f" {unit}" if unit == last[1] else f" {unit}..{number}"
    if isinstance(value, str):
        return f"{text} {value}"
    if value is None or last[2] is None:
        return text
    return f"{text} x{value:.4g}" if value == last[2] else f"{text} x{value:.4g}..{last[2]:.4g}"


def _group_rows(
    rows: Sequence[Row], name: str, keys: Sequence[str], full: bool
) -> list[tuple[str, str, Row, Row]]:
    """Group rows with equal `keys` whose names differ in numbers only: pattern, count, first and last row."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        pattern = (
            row[name]
            if full
            else ".".join("*" if part.isdigit() else part for part in row[name].split("."))
        )
        groups.setdefault((pattern, *(str(row[key]) for key in keys)), []).append(row)
    return [
        (
            pattern if len(found) > 1 else found[0][name],
            str(len(found)) if len(found) > 1 else "",
            found[0],
            found[-1],
        )
        for (pattern, *_), found in groups.items()
    ]


def _join(resources: Sequence[str]) -> str:
    """Return resources in one line, with signals as a count."""
    plain = [r for r in resources if not r.startswith("signal:")]
    signals = len(resources) - len(plain)
    return " ".join([*plain, *([f"{signals} signals"] if signals else [])])


def _print_batch(console: Console, row: Row | None) -> None:
    """Print what sets the batch, and which conversions hold for its first size only."""
    if row is None:
        return
    sizes = f"from {row['start']}" if row["start"] else "from the first batch of the training loop"
    sizes += (
        f" to {row['end']} samples in micro-batches of {row['micro_batch']}" if "end" in row else ""
    )
    console.print(f"Batch: {row['set_by']}, {sizes}")
    for note in row["notes"]:
        console.print(f"  note: {note}")
    console.print()


def _set_by_rules(plan: Plan) -> list[str]:
    """Return the fields that rules set, `label.field`, in the order of the spec."""
    actions = [action for rule in plan.spec["rules"] for action in rule["actions"]]
    targets = [action[1] for action in actions if action[0] == "assign"]
    return [target for target in dict.fromkeys(targets) if "." in target]


def _print_schedules(console: Console, plan: Plan, full: bool) -> None:
    if not plan.schedules:
        return
    every = list(plan.schedules[0]["values"])
    changing = [n for n in every if len({row["values"][n] for row in plan.schedules}) > 1]
    names = every if full else changing
    constant = [f"{n} {plan.schedules[0]['values'][n]:.4g}" for n in every if n not in changing]
    ruled = ", ".join(_set_by_rules(plan))
    if constant:
        how = f"until rules set {ruled}" if ruled else "in the whole run"
        console.print(f"Constant {how}: {', '.join(constant)}\n")
    shown = names if full else names[:SCHEDULES]
    units = [
        u for u in ("steps", "samples", "tokens", "epochs") if plan.schedules[-1][u] is not None
    ]
    rows = [
        (
            f"{r['percent']}%",
            *(f"{r[u]:,.6g}" for u in units),
            *(f"{r['values'][n]:.4g}" for n in shown),
        )
        for r in plan.schedules
        if full or r["percent"] % 10 == 0 or r["percent"] == 5
    ]
    title = f"Schedules, until rules set {ruled}" if ruled else "Schedules"
    _print_table(console, title, ("run", *units, *shown), rows, 10**9)
    if len(names) > len(shown):
        console.print(f"  and {len(names) - len(shown)} more schedules (--full)")


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], limit: int
) -> None:
    if not rows:
        return
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i in used:
        table.add_column(columns[i], overflow="fold")
    half = limit // 2
    lines = [[row[i] for i in used] for row in rows]
    if len(rows) > limit:
        gap = [f"... {len(rows) - 2 * half} more (--full)", *[""] * (len(used) - 1)]
        lines = [*lines[:half], gap, *lines[-half:]]
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print()
