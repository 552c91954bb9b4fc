"""Every two constructs of the catalog in one spec: they train as they should, or are refused with a reason.

A pair trains three steps by the modules and by the graph, with equal numbers, and goes on from a saved state bit for
bit. With `--only` the pairs of one construct are tried, and take the place of those in the file; with `--missing` those
that the file does not have.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/results/composition.json"
if str(ROOT) not in sys.path:  # `python -P` leaves it out
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks.measure import machine  # noqa: E402
from benchmarks.zoo.pairs import Found, examine_pair, pairs, sample  # noqa: E402

Rows = dict[tuple[str, str], dict[str, str]]


def main() -> int:
    """Try the pairs, and write what became of each; return 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="pairs with this construct, such as pace")
    parser.add_argument("--missing", action="store_true", help="pairs that the file does not have")
    parser.add_argument("--sample", action="store_true", help="the pairs that the tests try")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = _read(options.out) if options.only or options.missing else {}
    chosen = [
        pair
        for pair in ([one[:2] for one in sample()] if options.sample else pairs())
        if not options.only or options.only in " ".join(pair).split()
        if not options.missing or pair not in rows
    ]
    if options.only and not chosen:
        parser.error(f"nothing is called `{options.only}`, or all of its pairs are known")
    for done, found in enumerate(_found(chosen, options.processes), 1):
        rows[found.first, found.second] = _row(found)
        if found.outcome.status == "wrong":
            print(f"{found.first} x {found.second}: {found.outcome.detail}", flush=True)
        if done % 20 == 0:  # what was found is kept if the rest is interrupted
            print(f"{done} of {len(chosen)}", flush=True)
            _write(rows, options.out)
    _write(rows, options.out)
    return int(any(row["status"] == "wrong" for row in rows.values()))


def _found(chosen: Iterable[tuple[str, str]], processes: int) -> Iterator[Found]:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_quiet) as pool:
        yield from pool.map(_examine, chosen, chunksize=8)


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def _examine(pair: tuple[str, str]) -> Found:
    return examine_pair(*pair)


def _row(found: Found) -> dict[str, str]:
    said = {"model": found.model, "detail": found.outcome.detail}
    said["notes"] = "; ".join(found.outcome.notes)
    return {"status": found.outcome.status} | {name: text for name, text in said.items() if text}


def _read(path: Path) -> Rows:
    if not path.exists():
        return {}
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return {tuple(name.split(" x ")): row for name, row in cases.items()}


def _write(found: Rows, out: Path) -> None:
    """Write one line for each pair of constructs that there are."""
    known = set(pairs())
    rows = {pair: row for pair, row in sorted(found.items()) if pair in known}
    statuses = [row["status"] for row in rows.values()]
    head: dict[str, Any] = {
        "benchmark": "composition",
        "taken": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "expected": "every two constructs train together, or are refused with a reason: none is wrong",
        "met": "wrong" not in statuses,
        "counts": {status: statuses.count(status) for status in sorted(set(statuses))},
    }
    lines = ",\n".join(
        f"  {json.dumps(' x '.join(pair))}: {json.dumps(row)}" for pair, row in rows.items()
    )
    text = json.dumps(head, indent=1)[:-2] + ',\n "cases": {\n' + lines + "\n }\n}\n"
    json.loads(text)
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
