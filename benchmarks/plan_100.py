"""`trainc plan` of a GPT with 100 layers: seconds beyond importing torch."""

import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import ROOT
from benchmarks.measure import Json, Times, in_turn, seconds, timed_process

EXPECTED = "at most 2 seconds beyond `import torch`, every method of pretrain.train included"
GOAL = 2.0
ROUNDS = 7
MODEL = "layers = 4, width = 96, heads = 4, context = 64"
LARGE = "layers = 100, width = 1600, heads = 25, context = 1024"


def measure() -> Json:
    """Measure whole processes."""
    text = (ROOT / "examples/pretrain.train").read_text(encoding="utf-8")
    if MODEL not in text:
        raise RuntimeError("examples/pretrain.train has another model: bring this file up to date")
    command = str(Path(sys.executable).with_name("trainc"))
    with tempfile.TemporaryDirectory(dir=ROOT / "examples") as folder:  # finds `examples` above it
        spec = Path(folder, "large.train")
        spec.write_text(text.replace(MODEL, LARGE), encoding="utf-8")
        imports = [sys.executable, "-c", "import torch"]
        times = in_turn(
            {
                "trainc plan": lambda: timed_process([command, "plan", str(spec)]),
                "import torch": lambda: timed_process(imports),
            },
            ROUNDS,
            warm_up=1,
        )
    beyond = {clock: _beyond(times, clock) for clock in ("wall", "cpu")}
    return {
        "expected": EXPECTED,
        "met": beyond["cpu"] <= GOAL,
        "measured": {
            "seconds beyond import torch": beyond,
            "seconds": {name: seconds(found) for name, found in times.items()},
        },
    }


def _beyond(times: dict[str, list[Times]], clock: str) -> float:
    pairs = zip(times["trainc plan"], times["import torch"], strict=True)
    return float(round(median(getattr(a, clock) - getattr(b, clock) for a, b in pairs), 3))
