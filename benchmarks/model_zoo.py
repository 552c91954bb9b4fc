"""Every construct on small random models of many architectures: it works, with its numbers checked, or is refused.

A case is a construct's own example on one model, put on parts of it, or switched off. It trains three steps by the
modules and by the graph. Nothing may crash, and nothing may be left out in silence. timm needs torchvision; beside a
CPU torch: `pip install --no-deps timm torchvision`.
"""

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/results/model_zoo.json"
OWN = ROOT / "benchmarks/results/model_zoo_own_losses.json"
REPLICAS = ROOT / "benchmarks/results/model_zoo_replicas.json"
if str(ROOT) not in sys.path:  # `python -P` leaves it out
    sys.path.append(str(ROOT))

from benchmarks.measure import machine  # noqa: E402
from benchmarks.zoo.all_architectures import ARCHITECTURES  # noqa: E402
from benchmarks.zoo.architecture import Architecture  # noqa: E402
from benchmarks.zoo.cases import constructs, run_cases  # noqa: E402
from benchmarks.zoo.library_models import import_library  # noqa: E402
from benchmarks.zoo.replicas import examine_replicas  # noqa: E402


def main() -> int:
    """Run the cases, show a table, and write what each did; return 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", metavar="MODEL/CONSTRUCT", help="such as gpt2/pace, gpt2/ or /pace"
    )
    parser.add_argument(
        "--all", action="store_true", help="every selection, each by the graph as well"
    )
    parser.add_argument(
        "--own-losses", action="store_true", help="only models that train by a loss of their own"
    )
    parser.add_argument(
        "--replicas", action="store_true", help="every model as two processes, beside one process"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.replicas:
        return _as_replicas(options.out or REPLICAS)
    own, out = options.own_losses, options.out or (OWN if options.own_losses else OUT)
    model, _, construct = (options.only or "/").partition("/")
    every = options.all
    models = [
        name
        for name, one in ARCHITECTURES.items()
        if (not model or name == model) and (one.labels is not None or not own)
    ]
    methods = [name for name in constructs() if not construct or name.split()[-1] == construct]
    if not models or not methods:
        parser.error(f"nothing is called `{options.only}`")
    logging.disable(logging.WARNING)  # libraries tell of kernels that are not installed
    found = {}
    for name in models:
        found[name] = _examined(name, methods, every)
        if not options.only or options.out:  # whatever ends it, what was found stays
            _write(found, out)
    _show(found, methods)
    return int(any(row["status"] == "wrong" for rows in found.values() for row in rows))


def _as_replicas(out: Path) -> int:
    """Train every model that is installed as two replicas, and write what each did."""
    logging.disable(logging.WARNING)
    names = [name for name, one in ARCHITECTURES.items() if _is_installed(one)]
    found = {}
    for few in (names[at : at + 6] for at in range(0, len(names), 6)):  # told as it is found
        for name, outcome in examine_replicas(few).items():
            said = outcome.detail or outcome.notes[0]
            print(f"{name}: {outcome.status}: {said}", flush=True)
            found[name] = [{"status": outcome.status, "detail": said}]
    _write(found, out)
    return int(any(row["status"] == "wrong" for rows in found.values() for row in rows))


def _is_installed(architecture: Architecture) -> bool:
    try:
        return architecture.library == "torch" or bool(import_library(architecture.library))
    except ImportError as error:
        print(f"{architecture.name}: left out: {error}", flush=True)
        return False


def _examined(model: str, methods: Sequence[str], every: bool) -> list[dict[str, Any]]:
    """Return what each case of an architecture did; nothing where its library is not installed."""
    architecture, started = ARCHITECTURES[model], time.monotonic()
    if architecture.library != "torch":
        try:
            import_library(architecture.library)
        except ImportError as error:
            print(f"{model}: left out: {error}", flush=True)
            return []
    rows = []
    for method in methods:
        for case, outcome in run_cases(architecture, method, every=every):
            what = {"construct": method, "selects": case.selects, "status": outcome.status}
            said = {"detail": outcome.detail, "notes": outcome.notes}
            rows.append(what | {name: value for name, value in said.items() if value})
            if outcome.status == "wrong":
                print(f"{model}: {' '.join(case.clause.split())}\n  {outcome.detail}", flush=True)
    counts = Counter(row["status"] for row in rows)
    text = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    print(f"{model}: {text} in {time.monotonic() - started:.0f} s", flush=True)
    return rows


def _show(found: dict[str, list[dict[str, Any]]], methods: Sequence[str]) -> None:
    """Print how many cases of each pair work and how many are refused, as `3+2`; `!` marks those that are wrong."""
    width = max(map(len, found)) + 1
    for number, method in enumerate(methods):
        print(f"{' ' * width}{'      |' * number}{' ' * 3}{method}")
    for model, rows in found.items():
        line = f"{model:{width}}"
        for method in methods:
            counts = Counter(row["status"] for row in rows if row["construct"] == method)
            cell = f"{counts['works']}+{counts['refused']}" if counts else "-"
            line += f"{cell + '!' * bool(counts['wrong']):>6} "
        print(line)


def _write(found: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write one line for each case."""
    counts = Counter(row["status"] for rows in found.values() for row in rows)
    head = {
        "benchmark": "model_zoo",
        "taken": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "expected": "every case works or is refused at a place: none is wrong",
        "met": not counts["wrong"],
        "counts": dict(sorted(counts.items())),
    }
    blocks = []
    for model, rows in found.items():
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        blocks.append(f'"{model}": [\n{lines}\n ]')
    text = json.dumps(head, indent=1)[:-2] + ',\n "cases": {\n ' + ",\n ".join(blocks) + "\n }\n}\n"
    json.loads(text)
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
