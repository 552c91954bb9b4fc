"""`trainc check` as a whole process against the least that any parser with checked fields does."""

import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.measure import Json, compared, in_turn, seconds, timed_process

SCRIPT = """
import lark, pydantic

class Model(pydantic.BaseModel):
    value: int = 1
"""
EXPECTED = "median ratio to a script that imports lark and builds one pydantic model at most 1.25, both processes new"
GOAL = 1.25
ROUNDS = 30


def measure() -> Json:
    """Measure whole processes."""
    command = str(Path(sys.executable).with_name("trainc"))
    check = [command, "check", str(ROOT / "examples/pretrain.train")]
    script = [sys.executable, "-c", SCRIPT]
    bare = [sys.executable, "-c", "pass"]
    times = in_turn(
        {
            "trainc check": lambda: timed_process(check),
            "lark and one pydantic model": lambda: timed_process(script),
            "python": lambda: timed_process(bare),
        },
        ROUNDS,
    )
    ratio = compared(times["trainc check"], times["lark and one pydantic model"])
    return {
        "expected": EXPECTED,
        "met": ratio["cpu"]["median"] <= GOAL,
        "measured": {
            "ratio": ratio,
            "seconds": {name: seconds(found) for name, found in times.items()},
        },
    }
