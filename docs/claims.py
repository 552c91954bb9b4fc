"""The page of published claims that were tried, made from what benchmarks/claims wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TITLES = {
    "temp_balance": "Rates by the tails of spectra",
    "small_batch": "The half-life of Adam's second moment, held in tokens",
    "allocation": "Sparsity of blocks by the tails of their spectra",
    "ghost": "Ghost batches and the generalization gap",
    "norm_growth": "The law by which the norm of weights grows",
    "saturation": "Saturation as the norm grows",
    "sift_claim": "Which entries to train in fine-tuning",
    "pace_claim": "Consistency under noise, for adaptation with few images",
    "influence": "Wrong labels, found by the influence of examples on themselves",
    "leader": "Processes that follow the best of them, average, or take outer steps",
    "frequency": "Low frequencies first, by amplitude and without gradients",
    "learned_init": "A start that Reptile learns, and joint training with as many steps",
    "demo_search": "Which methods help to adapt with few images",
}
"""What each result is about, by its file."""
HEAD = """# Published claims, tried

Written by `make docs` from `benchmarks/results/`. Each is `python -m benchmarks.claims.NAME`, the search at the end
`python -m benchmarks.demo_search`: small models, minutes on one core, many seeds, and what is compared was fixed before
it was looked at. Do not carry the numbers over to large models. Figures are means over seeds with their intervals. Two
more claims, on the noise scale, are in [noise-scale.md](noise-scale.md).
"""
SKIPPED = ("machine", "setting", "seconds", "first seed", "steps")
Json = dict[str, Any]


def claims_page() -> str:
    """Return docs/claims.md."""
    lines = [HEAD]
    for name, title in TITLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += _claim(title, json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines)


def _claim(title: str, found: Json) -> list[str]:
    level = f"{100 * found['level of the intervals']:.0f}"
    met = [f"- {what}: {'yes' if is_met else '**no**'}" for what, is_met in found["met"].items()]
    lines = [
        f"## {title}",
        "",
        f"`{found['benchmark']}`, taken {found['taken']}; intervals of {level} %.",
        "",
    ]
    lines += [*found["definition"], f"Expected: {found['expected']}. Found:", "", *met, ""]
    for path, table in _tables((), found):
        lines += [f"{path[:1].upper()}{path[1:]}:" if path else "", "", *table, ""]
    return lines


def _share_columns(rows: Json) -> bool:
    return len(rows) == 1 or bool(set.intersection(*map(set, rows.values())))


def _tables(path: tuple[str, ...], node: Json) -> Iterator[tuple[str, list[str]]]:
    """Yield each group of figures as a table, with the names that lead to it."""
    parts = {key: one for key, one in node.items() if isinstance(one, dict) and key not in SKIPPED}
    figures = [figure for one in parts.values() for figure in one.values()]
    if parts and all(map(_is_figure, parts.values())):
        rows = [f"| {key} | {_cell(one)} |" for key, one in parts.items()]
        yield ", ".join(path), ["| | mean |", "|---|---|", *rows]
    elif len(path) > 1 and figures and all(map(_is_figure, figures)) and _share_columns(parts):
        yield ", ".join(path), _wide(parts)
    else:
        for key, one in parts.items():
            yield from _tables((*path, key), one)


def _wide(parts: Json) -> list[str]:
    """Return a table with a column for each figure that one of the rows has."""
    columns = list(dict.fromkeys(column for one in parts.values() for column in one))
    rows = [
        f"| {key} | {' | '.join(_cell(one[c]) if c in one else '' for c in columns)} |"
        for key, one in parts.items()
    ]
    return [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]


def _is_figure(one: Any) -> bool:
    return isinstance(one, dict) and "mean" in one and "interval" in one


def _cell(one: Json) -> str:
    low, high = one["interval"]
    return f"{one['mean']:.4g} ({low:.4g} to {high:.4g})"
