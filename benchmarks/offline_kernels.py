"""What the kernels launch on GPUs that are not here: instructions, registers, programs, launches, bytes and host time.

`python -m benchmarks.offline_kernels` runs every operator's CUDA path on a driver that launches nothing, for sm_80,
sm_90 and sm_100, and writes benchmarks/results/offline_kernels.json beside the figures of an earlier commit, which
`--before` takes anew; `--only NAME` records the operators whose names begin so, and keeps what is known of the others.
No time of a device is in it.
"""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measure import Json, machine
from benchmarks.offline.recorder import START

RESULT = ROOT / "benchmarks" / "results" / "offline_kernels.json"
TARGETS = ("90", "80", "100")
BEFORE = "7648617cdf0e3f251afc520ebe6759c5e2650f5a"
"""The commit that is compared with: the kernels as they were first judged without a device."""
LAUNCHES, INSTRUCTIONS = 2, 10.0
SOURCES = ("triton_*.py", "launch.py", "occupancy.py", "tiles.py")
"""Files of kernels that the figures follow from."""


def recorded(root: Path, target: str, only: str = "") -> Json:
    """Return what the operators of a checkout launch, from a process of its own."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", START]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(root), str(ROOT), target, only],
        env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"recording {root} for sm_{target} failed: {done.stderr[-2000:]}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def report(root: Path, targets: tuple[str, ...] = TARGETS, only: str = "") -> Json:
    """Return the figures of a checkout for every target."""
    found: Json = {"launches": []}
    for target in targets:
        one = recorded(root, target, only)
        found["launches"] += one.pop("launches")
        found |= one
        print(f"sm_{target}: {len(found['launches'])} rows", file=sys.stderr, flush=True)
    return found


def joined(known: Json, found: Json, only: str) -> Json:
    """Return the figures that are known, with those of operators that begin with `only` as they were found now."""
    order = {f"sm_{target}": place for place, target in enumerate(TARGETS)}
    result = dict(known)
    for name in ("launches", "host"):
        kept = [one for one in known[name] if not one["operator"].startswith(only)]
        result[name] = sorted(
            [*kept, *found[name]], key=lambda one: order.get(one.get("target", ""), 0)
        )
    return result


def sources(root: Path = ROOT) -> dict[str, str]:
    """Return what tells each file of kernels from itself with other code; comments and docstrings are not code."""
    paths = sorted(path for name in SOURCES for path in (root / "kernels").rglob(name))
    return {path.relative_to(root).as_posix(): code_hash(path.read_text("utf-8")) for path in paths}


def code_hash(text: str) -> str:
    """Return a short hash of a file's statements, whatever its comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def goals(found: Json) -> list[Json]:
    """Return what the kernels are to reach without a device, and whether they do."""
    rows = found["launches"]
    backward = [
        r for r in rows if "norm" in r["operator"] and _is_norm(r) and r["phase"] == "backward"
    ]
    loss = {
        k[
            "instructions an element"
        ]: f"{r['operator']} {'x'.join(map(str, r['size']))} {r['target']}"
        for r in rows
        if r["operator"].startswith("loss") and r["phase"] == "forward"
        for k in r["kernels"]
        if k["instructions an element"] is not None
    }
    spilled = [
        f"{k['kernel']} {r['target']}" for r in rows for k in r["kernels"] if k["spilled bytes"]
    ]
    tables = found.get("tables", [])
    launches = [r["launches"] for r in backward]
    slow = [f"{t['model']}: {t['host us']:.0f} us" for t in tables if t["host us"] > t["device us"]]
    return [
        _goal("launches of a norm's backward", f"at most {LAUNCHES}", max(launches), max(launches) <= LAUNCHES),
        _goal(
            "instructions an element of the loss's forward", f"at most {INSTRUCTIONS:g}",
            f"{max(loss)} ({loss[max(loss)]}); least {min(loss)}", max(loss) <= INSTRUCTIONS,
        ),
        _goal("kernels that spill registers", "none", ", ".join(sorted(set(spilled))) or "none", not spilled),
        _goal(
            "models whose multi_norm takes longer on the host than by the copy rate on a device", "none",
            "; ".join(slow) or "none", not slow,
        ),
    ]  # fmt: skip


def _is_norm(row: Json) -> bool:
    operator: str = row["operator"]
    return operator.removeprefix("add_") in ("layer_norm", "rms_norm")


def _goal(what: str, bound: str, found: Any, reached: bool) -> Json:
    return {"what": what, "bound": bound, "found": found, "reached": bool(reached)}


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Yield a folder with the sources of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(root), commit], check=True)
        try:
            yield root
        finally:
            subprocess.run([*git, "remove", "--force", str(root)], check=True)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", action="store_true", help="record the earlier commit, too")
    parser.add_argument(
        "--only",
        default="",
        help="record the operators that begin so, and keep the others' figures",
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    known: Json = {}
    if options.out.exists():
        known = json.loads(options.out.read_text(encoding="utf-8"))
    if known and not options.before:
        before = known["before"]
    else:
        with checkout(BEFORE) as root:
            before = {"commit": BEFORE, **report(root)}
    after = report(ROOT, only=options.only)
    if options.only and known:
        after = joined(known["after"], after, options.only)
    found: Json = {
        "taken": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "triton": version("triton"),
        "sources": sources(),
        "goals": goals(after),
        "before": before,
        "after": after,
    }
    options.out.write_text(as_text(found), encoding="utf-8")
    for goal in found["goals"]:
        print(
            f"{'reached' if goal['reached'] else 'MISSED '} {goal['what']} {goal['bound']}: {goal['found']}"
        )


def as_text(found: Json) -> str:
    """Return the report as JSON, a line for each row."""
    text = json.dumps({**found, "before": None, "after": None}, indent=1)
    for name in ("before", "after"):
        lines = []
        for key, value in found[name].items():
            rows = (
                ",\n   ".join(json.dumps(one) for one in value) if isinstance(value, list) else None
            )
            lines.append(
                f"  {json.dumps(key)}: "
                + (json.dumps(value) if rows is None else f"[\n   {rows}\n  ]")
            )
        text = text.replace(f'"{name}": null', f'"{name}": {{\n' + ",\n".join(lines) + "\n }")
    return text + "\n"


if __name__ == "__main__":
    main()
