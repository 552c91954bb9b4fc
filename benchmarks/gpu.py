"""Operators and whole steps on a GPU: `python benchmarks/gpu.py --out FILE`, under 8 minutes for what matters most.

It needs a checkout, torch, triton and numpy, and no install; whole steps of ours need lark, pydantic and safetensors as
well, and say so where these are missing.

Rows run in the order of what they are worth (on_gpu/catalogue.py): first whether results are right, against float64,
on unaligned and on transposed memory, captured, beyond 2^31 entries; then what was predicted (on_gpu/predictions.py)
and whether the device confirms or refutes it; then everything else. FILE is written after every row. A second start
runs what has no result yet, where device, versions and sources are the same; else FILE is set aside. A row that hangs
or loses the device is a result, and the next one gets a new process.

Times are of the device: medians over graphs of many calls on input sets that together exceed the cache, backward by
itself. Rates are fractions of the device's measured copy rate, which is taken, with its clocks, at start and end.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Started as a file, Python looks for imports beside the file; ours start at the checkout.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import whole_steps
from benchmarks.device import Cuda, DryRun
from benchmarks.measure import Json
from benchmarks.on_gpu import catalogue
from benchmarks.on_gpu.predictions import verdicts
from benchmarks.on_gpu.supervisor import Unusable, cuda, supervise
from benchmarks.on_gpu.timed import VERSIONS

HEADS = {
    "operators": f"{'us, forward + backward':58}"
    + "".join(f"{name:>11}" for name in VERSIONS)
    + "    of copy rate, run",
    "steps": whole_steps.heading(),
}


def show() -> Callable[[Json, Json], None]:
    """Return what prints a row, under its part's heading where that begins; before the first, what is measured."""
    last = [""]

    def say(row: Json, found: Json) -> None:
        part = row["part"]
        if not last[0]:
            versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
            print(f"{found['device']}; {versions}; commit {found['commit']}")
        if part != last[0]:
            print(HEADS.get(part, part), flush=True)
            last[0] = part
        print(line(row, found), flush=True)

    return say


def line(row: Json, found: Json) -> str:
    """Return one row as text."""
    if "failed" in row:
        return f"FAILED {row['name']}: {row['failed']}"
    if row["part"] == "steps":
        return whole_steps.line(row, found["rows"])
    if row["part"] == "operators":
        return _operator(row, found)
    notes = {k: v for k, v in row.items() if k not in ("key", "part", "name", "passed", "found")}
    return f"{'ok   ' if row['passed'] else 'WRONG'} {row['name']}  {notes}"


def _operator(row: Json, found: Json) -> str:
    rate = max((one["copy TB/s"] for one in found["conditions"]), default=math.nan)
    parts = [f"{row['name']:58}"]
    for version in VERSIONS:
        phases = row["times"].get(version, {})
        spent = [phases.get(one, {}).get("median") for one in ("forward", "backward")]
        parts.append(f"{'+'.join('-' if one is None else f'{one:.0f}' for one in spent):>11}")
    ours = row["times"]["ours"]
    for phase, spent in ours.items():
        parts.append(f"{row['bytes'][phase] / spent['median'] / 1e6 / rate:5.2f} {spent['how']}")
    verdict = "ok" if row["passed"] else f"WRONG {row['error']:.1e}"
    return " ".join(parts) + f" {verdict}{'' if row['repeatable'] else ' VARIES'}"


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when every result was right, 1 when one was not or measuring broke off, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="what names of rows start with")
    parser.add_argument(
        "--out", type=Path, help="where the JSON goes, and where it is resumed from"
    )
    parser.add_argument("--full", action="store_true", help="norms at every size")
    parser.add_argument(
        "--parts", nargs="+", choices=catalogue.PARTS, default=catalogue.WANTED,
        help="what is measured (all but accuracy)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the parameters in whole steps: those of float32 compute in bf16 by autocast (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=float,
        default=450.0,
        help="start no row that is expected to end after this (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="try the script on a CPU")
    options: Any = parser.parse_args(arguments)
    dry: bool = options.dry_run
    backend = "aot_eager" if dry else "inductor"
    every = catalogue.rows(not dry, backend, options.full, options.weights, options.only)
    rows = [row for row in every if row.part in options.parts]
    device: Callable[[], Cuda] = DryRun if dry else cuda
    try:
        found = supervise(rows, device, options.out, options.seconds, show(), verdicts)
    except Unusable as error:
        print(f"Nothing was measured: {error}.", file=sys.stderr)
        return 1
    if found is None:
        print("There is no CUDA device: nothing was measured.", file=sys.stderr)
        return 2
    finish(found)
    if "stopped" in found:
        print(f"Not all was measured: {found['stopped']}.", file=sys.stderr)
        return 1
    keys = {row.key for row in rows}
    return 0 if all(one.get("passed") for one in found["rows"] if one["key"] in keys) else 1


def finish(found: Json) -> None:
    """Say under which conditions rows were taken and what became of the predictions."""
    for one in found["conditions"]:
        print("  ".join(f"{name} {value}" for name, value in one.items()))
    for one in found["predictions"]:
        bounds = " ".join(f"at {bound} {one[bound]}" for bound in ("least", "most") if bound in one)
        print(f"{one['verdict']:12} {one['what']}: {one['measured']} ({one['kind']}: {bounds})")
    if found["left out"]:
        print(f"left out for want of time: {len(found['left out'])}")


if __name__ == "__main__":
    sys.exit(main())
