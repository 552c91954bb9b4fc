"""The page of pairs of constructs, made from benchmarks/results/composition.json."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks/results/composition.json"
HEAD = """# Which constructs go together

Written by `make docs` from `benchmarks/results/composition.json`, which `benchmarks/composition.py` writes. It puts
every two constructs into one spec, each as its own example has it, on the first of five small models on which each of
the two trains alone. Together they train three steps in float64 by the modules and by the graph, with equal numbers,
and go on from a saved state bit for bit; or trainc refuses them, and says where and why.
"""
ROW = dict[str, Any]


def composition_page() -> str:
    """Return docs/composition.md."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    cases: dict[str, ROW] = found["cases"]
    counts = ", ".join(f"{count} {status}" for status, count in found["counts"].items())
    lines = [HEAD, f"{len(cases)} pairs: {counts}. Taken {found['taken']}.", "", *_table(cases)]
    lines += _section("Refused", "why", cases, lambda row: row["status"] == "refused")
    lines += _section(
        "By the modules alone",
        "why no graph runs it",
        cases,
        lambda row: row["status"] == "works" and "notes" in row,
    )
    lines += _section("Wrong", "what", cases, lambda row: row["status"] == "wrong")
    return "\n".join(lines)


def _table(cases: dict[str, ROW]) -> list[str]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, row in cases.items():
        for one in set(name.split(" x ")):
            counts[one][_told(row)] += 1
    head = ("works", "refused", "no model fits both", "wrong")
    rows = [
        f"| `{one}` | {' | '.join(str(found[status]) for status in head)} |"
        for one, found in sorted(counts.items())
    ]
    return [f"| construct | {' | '.join(head)} |", "|---|" + "---|" * len(head), *rows, ""]


def _told(row: ROW) -> str:
    if row["status"] == "refused" and "model" not in row:
        return "no model fits both"
    return str(row["status"])


def _section(title: str, why: str, cases: dict[str, ROW], belongs: Any) -> list[str]:
    rows = [
        f"| {' with '.join(f'`{one}`' for one in name.split(' x '))} | {_cell(row)} |"
        for name, row in cases.items()
        if belongs(row) and "model" in row
    ]
    return [f"## {title}", "", f"| pair | {why} |", "|---|---|", *rows, ""] if rows else []


def _cell(row: ROW) -> str:
    text = row.get("detail") or row["notes"]
    return " ".join(str(text).replace("|", "\\|").split())
