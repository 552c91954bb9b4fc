"""Folders of runs with noise scales, written by hand."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainc.runtime.storage.jsonl import encode

NAN = math.nan


def figures(
    label: str,
    scale: float,
    low: float = NAN,
    high: float = NAN,
    signal: float = 1.0,
    noise: float = 1.0,
) -> dict[str, float]:
    """Return what a step records of one noise scale."""
    parts = {"signal": signal, "noise": noise, "error": NAN, "low": low, "high": high}
    return {label: scale, **{f"{label}.{name}": value for name, value in parts.items()}}


def step(
    number: int,
    *parts: Mapping[str, Any],
    series: Mapping[str, Any] | None = None,
    batch: int = 8,
    tokens: int = 100,
) -> dict[str, Any]:
    """Return the record of a step, each so far over `batch` samples of `tokens` tokens, with more parts."""
    samples = number * batch
    record: dict[str, Any] = {
        "step": number,
        "samples": samples,
        "tokens": samples * tokens,
        "batch": batch,
    }
    record |= {"epochs": samples / 1000, "loss": 1 / number}
    for part in parts:
        record |= part
    return record if series is None else {**record, "series": series}


def plan(*clauses: tuple[str, str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of a plan that pictures read: clauses as kind, label, fields."""
    constructs = {"noise_scale": "gns", "observe": "norm_growth"}
    rows = [
        {"kind": k, "label": label, "construct": constructs[k], "fields": fields, "targets": []}
        for k, label, fields in clauses
    ]
    return {"clauses": rows}


def write_run(
    folder: Path, records: Iterable[Mapping[str, Any]], plan: Mapping[str, Any] | None = None
) -> Path:
    """Write a run's folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(encode(record)) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if plan is not None:
        (folder / "plan.json").write_text(json.dumps(plan))
    return folder


SCALES: Sequence[float] = (4.0, NAN, NAN, 10.0, 20.0, NAN)


def six_steps() -> list[dict[str, Any]]:
    """Return six steps of 800 tokens; `gns` is undetermined in the second, third and last."""
    records = []
    for number, scale in enumerate(SCALES, 1):
        known = math.isfinite(scale)
        gns = figures("gns", scale, 0.5 * scale if known else 3.0, 2 * scale if known else math.inf)
        layers = {"a": scale, "b": 2.0 * number, "c": NAN}
        series = {
            "gns": layers,
            "gns.signal": {"a": 1.0, "b": 2.0, "c": -1.0},
            "gns.noise": {"a": 3.0, "b": 5.0, "c": 2.0},
        }
        records.append(step(number, gns, series=series))
    return records
