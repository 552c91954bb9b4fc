"""Take the measurements and write them to benchmarks/results/, one JSON file each."""

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
NAMES = (
    "check_cold", "plan_100", "empty_spec", "rewrites", "pace", "noise_scale", "compiled", "loops",
    "sift", "observers",
)  # fmt: skip
ON_REQUEST = ("kills", "compiled_constructs")
"""Those that take long and measure no time."""

# `python -P` leaves the script's folder out, and this is the folder above it.
sys.path.append(str(ROOT))


def main() -> None:
    """Run the benchmarks named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*NAMES, *ON_REQUEST)))
    wanted = parser.parse_args().names or NAMES
    if unknown := [name for name in wanted if name not in NAMES + ON_REQUEST]:
        parser.error(
            f"there is no benchmark `{unknown[0]}`: there are {', '.join(NAMES + ON_REQUEST)}"
        )
    measure = import_module("benchmarks.measure")
    RESULTS.mkdir(exist_ok=True)
    for name in wanted:
        print(f"{name} ...", flush=True)
        before = measure.load()
        found = import_module(f"benchmarks.{name}").measure()
        result = {
            "benchmark": name,
            "taken": datetime.now(UTC).date().isoformat(),
            "machine": measure.machine(),
            "load average": {"before": before, "after": measure.load()},
            **found,
        }
        text = json.dumps(result, indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(json.dumps({key: found[key] for key in ("expected", "met")}))
        print(json.dumps(found["measured"], indent=1))


if __name__ == "__main__":
    main()
