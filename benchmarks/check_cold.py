"""`trainc check` as a whole process against importing what any parser with checked fields imports."""

import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.measure import Json, compared, in_turn, seconds, timed_process

EXPECTED = 'median ratio to `python -c "import lark, pydantic"` at most 1.5, both processes new'
GOAL = 1.5
ROUNDS = 30


def measure() -> Json:
    """Measure whole processes."""
    command = str(Path(sys.executable).with_name("trainc"))
    check = [command, "check", str(ROOT / "examples/pretrain.train")]
    imports = [sys.executable, "-c", "import lark, pydantic"]
    bare = [sys.executable, "-c", "pass"]
    times = in_turn(
        {
            "trainc check": lambda: timed_process(check),
            "import lark, pydantic": lambda: timed_process(imports),
            "python": lambda: timed_process(bare),
        },
        ROUNDS,
    )
    ratio = compared(times["trainc check"], times["import lark, pydantic"])
    return {
        "expected": EXPECTED,
        "met": ratio["cpu"]["median"] <= GOAL,
        "measured": {
            "ratio": ratio,
            "seconds": {name: seconds(found) for name, found in times.items()},
        },
    }
