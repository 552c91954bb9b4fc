"""The plan as tables for people."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainc.compiler.plan.plan import Plan

SHORT = 40
MOVING = 4
WIDE = 132
Row = dict[str, Any]


def show_plan(plan: Plan, full: bool = False, console: Console | None = None) -> None:
    """Print the plan. Layers treated alike share a row, and long tables are cut in the middle, unless `full`."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    limit = 10**9 if full else SHORT
    total = sum(_numel(row["shape"]) for row in plan.parameters)
    console.print(
        f"[bold]{plan.model['type']}[/]: {len(plan.parameters)} parameters, {total:,} numbers"
    )
    for clause in plan.clauses:
        if clause["dropped"]:
            console.print(
                f"not in the program: {clause['kind']} {clause['construct']} ({clause['dropped']})"
            )
    console.print()
    columns = (
        "name",
        "count",
        "shape",
        "depth",
        "optimizer",
        "decay",
        "learning rate factors",
        "mask",
        "clauses",
    )
    _print(console, "Parameters: who gets what", columns, _parameters(plan.parameters, full), limit)
    step = [
        (
            f"{r['phase']} {r['name']}",
            r["clause"],
            r["action"],
            _joined(r["reads"]),
            _joined(r["writes"]),
            r["every"],
        )
        for r in plan.steps
    ]
    _print(
        console, "The step", ("phase", "clause", "action", "reads", "writes", "when"), step, limit
    )
    _batch(console, plan.settings.get("batch"))
    _schedules(console, plan, full)
    sites = _alike(plan.sites, "site", ("operator", "pass", "executor"), full)
    rows = [(name, count, r["operator"], r["pass"], r["executor"]) for name, count, r, _ in sites]
    _print(
        console, "Rewritten layers", ("site", "count", "operator", "pass", "executor"), rows, limit
    )
    kernels = [(k["operator"], k["implementation"], k["reason"] or "") for k in plan.kernels]
    _print(console, "Kernels", ("operator", "implementation", "why not Triton"), kernels, limit)
    memory = [(m["what"], _size(m["bytes"])) for m in plan.memory]
    _print(console, "Memory beyond weights and gradients", ("what", "size"), memory, limit)
    console.print(f"plan {plan.hash[:16]}  spec {plan.fingerprint[:16]}")


def _parameters(rows: Sequence[Row], full: bool) -> list[Sequence[str]]:
    keys = ("shape", "optimizer", "decay", "lr_factors", "mask", "clauses")
    return [
        (
            name,
            count,
            "x".join(map(str, p["shape"])),
            f"{p['depth']:.2f}"
            if p["depth"] == last["depth"]
            else f"{p['depth']:.2f}..{last['depth']:.2f}",
            p["optimizer"] or "frozen",
            "" if p["decay"] is None else f"{p['decay']:g}",
            ", ".join(p["lr_factors"]),
            p["mask"] or "",
            ", ".join(p["clauses"]),
        )
        for name, count, p, last in _alike(rows, "name", keys, full)
    ]


def _alike(
    rows: Sequence[Row], name: str, keys: Sequence[str], full: bool
) -> list[tuple[str, str, Row, Row]]:
    """Collect rows whose names differ in numbers only and that agree in `keys`: pattern, count, first and last."""
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


def _joined(resources: Sequence[str]) -> str:
    """Return resources in one line; signals are many, so they are counted."""
    plain = [r for r in resources if not r.startswith("signal:")]
    signals = len(resources) - len(plain)
    return " ".join([*plain, *([f"{signals} signals"] if signals else [])])


def _batch(console: Console, row: Row | None) -> None:
    """Print what sets a batch that changes, and which conversions hold only where it begins."""
    if row is None:
        return
    sizes = f"from {row['start']}" if row["start"] else "from the size that the loop starts with"
    sizes += (
        f" to {row['end']} samples in micro-batches of {row['micro_batch']}" if "end" in row else ""
    )
    console.print(f"Batch: {row['set_by']}, {sizes}")
    for note in row["notes"]:
        console.print(f"  note: {note}")
    console.print()


def _schedules(console: Console, plan: Plan, full: bool) -> None:
    if not plan.schedules:
        return
    every = list(plan.schedules[0]["values"])
    moving = [n for n in every if len({row["values"][n] for row in plan.schedules}) > 1]
    names = every if full else moving
    shown = names if full else names[:MOVING]
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
    _print(console, "Schedules", ("run", *units, *shown), rows, 10**9)
    if len(names) > len(shown):
        console.print(f"  and {len(names) - len(shown)} more scheduled numbers (--full)")


def _print(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], limit: int
) -> None:
    kept = [tuple(row) for row in rows]
    if not kept:
        return
    used = [i for i in range(len(columns)) if any(row[i] for row in kept)]
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i in used:
        table.add_column(columns[i], overflow="fold")
    half = limit // 2
    shown = kept if len(kept) <= limit else kept[:half]
    for row in shown:
        table.add_row(*(row[i] for i in used))
    if len(kept) > limit:
        table.add_row(f"... {len(kept) - 2 * half} more (--full)", *[""] * (len(used) - 1))
        for row in kept[-half:]:
            table.add_row(*(row[i] for i in used))
    console.print(table)
    console.print()


def _numel(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
