"""The files of a run as a report reads them: each is held to its shape, since anybody may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainc.runtime.storage.foreign_files import UnreadableFile, interpreting, read_json
from trainc.runtime.storage.jsonl import Record, read_jsonl


def read_metrics(path: Path) -> list[Record]:
    """Return the records of `metrics.jsonl`: numbers, and those of layers in `series`; raises UnreadableFile."""
    records = read_jsonl(path)
    for number, record in enumerate(records, 1):
        try:
            _check_record(record)
        except ValueError as error:
            raise UnreadableFile(f"{path}, record {number}: {error}") from error
    return records


def read_seconds(path: Path) -> float:
    """Return the time of all steps in `timing.jsonl`; 0 without the file. Raises UnreadableFile."""
    if not path.exists():
        return 0.0
    with interpreting(path):
        return float(sum(_number(record, "seconds") for record in read_jsonl(path)))


def read_summary(path: Path) -> dict[str, Any]:
    """Return what `summary.json` says; empty without the file. Raises UnreadableFile."""
    if not path.exists():
        return {}
    summary = read_json(path)
    with interpreting(path):
        for name in ("reason", "message"):
            _require(isinstance(summary.get(name, ""), str), f"expected a text as `{name}`")
        lines = summary.get("lines", [])
        right = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
        _require(right, "expected a list of texts as `lines`")
    return summary


def check_plan(plan: Mapping[str, Any]) -> None:
    """Raise ValueError for a plan whose clauses have not the shape of clauses."""
    clauses = plan.get("clauses", [])
    _require(isinstance(clauses, list), "expected a list as `clauses`")
    for clause in clauses:
        _require(isinstance(clause, dict), "expected an object as a clause")
        for name in ("kind", "construct", "label"):
            _require(isinstance(clause[name], str), f"expected a text as `{name}` of a clause")
        _require(isinstance(clause["fields"], dict), "expected an object as `fields` of a clause")


def _check_record(record: Record) -> None:
    _number(record, "step")
    for name in record:
        if name != "series":
            _number(record, name)
    series = record.get("series", {})
    _require(isinstance(series, dict), "expected an object as `series`")
    for quantity, layers in series.items():
        _require(isinstance(layers, dict), f"expected an object as `{quantity}` of `series`")
        for layer in layers:
            _number(layers, layer)


def _number(record: Mapping[str, Any], name: str) -> float:
    found = record.get(name)
    _require(isinstance(found, int | float), f"expected a number as `{name}`, found {found!r:.40}")
    return found  # type: ignore[return-value]  # it was checked in the line above


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
