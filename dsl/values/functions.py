"""The functions of expressions. tests/dsl/test_functions.py holds them to what the runtime has."""

from __future__ import annotations

from typing import Literal

from trainc.dsl.text.record import Record

Kind = Literal[
    "duration", "number", "points", "shape", "numbers", "amount", "plain", "samples", "switch"
]


class Function(Record):
    """A signature: arguments in order, how many may stand without a name, how many must stand."""

    arguments: dict[str, Kind]
    positional: int
    required: int
    about: str
    schedule: bool = True


_DECAY: dict[str, Kind] = {"to": "number", "over": "duration", "from": "number"}

FUNCTIONS: dict[str, Function] = {
    "warmup": Function(
        {"over": "duration", "from": "number"}, 1, 1, "rise on a line from `from` (0) to 1"
    ),
    "constant": Function(
        {"value": "number", "over": "duration"}, 1, 0, "stay at `value` (1), for `over` or for good"
    ),
    "cosine": Function(_DECAY, 1, 0, "fall from `from` (1) to `to` (0) on half a cosine"),
    "linear": Function(_DECAY, 1, 0, "go from `from` (1) to `to` (0) on a line"),
    "exponential": Function(_DECAY, 1, 1, "fall from `from` (1) to `to` by a constant factor"),
    "inverse_sqrt": Function(
        {"over": "duration"}, 1, 1, "fall as sqrt(d / (d + t)), t since its start, d = `over`"
    ),
    "step": Function(
        {"at": "points", "factor": "number"}, 1, 2, "multiply by `factor` at each point of `at`"
    ),
    "wsd": Function(
        {"warmup": "duration", "decay": "duration", "to": "number", "shape": "shape"},
        0,
        2,
        "rise for `warmup`, stay at 1, fall to `to` (0) over the last `decay` of the run",
    ),
    "min": Function({"x": "numbers"}, 1, 1, "the least of its arguments", schedule=False),
    "max": Function({"x": "numbers"}, 1, 1, "the greatest of its arguments", schedule=False),
    "sqrt": Function({"x": "number"}, 1, 1, "the square root", schedule=False),
    "log": Function({"x": "number"}, 1, 1, "the natural logarithm", schedule=False),
    "exp": Function({"x": "number"}, 1, 1, "e to the power of x", schedule=False),
    "abs": Function({"x": "number"}, 1, 1, "the absolute value", schedule=False),
}


def example(name: str) -> str:
    """Return a call of a function with the arguments it must have: `cosine()`, `warmup(over = ...)`."""
    needed = list(FUNCTIONS[name].arguments)[: FUNCTIONS[name].required]
    return f"{name}({', '.join(f'{argument} = ...' for argument in needed)})"


SHAPES = ("linear", "cosine", "sqrt")
STATES = ("nan", "inf", "finite")
COUNTERS = ("steps", "samples", "tokens", "epochs", "seconds")
PLACES = ("depth", "block", "blocks")  # where a value is used, in the order of the model
SCHEDULE_NAMES = (*PLACES, "progress", *COUNTERS)
SIGNALS = ("loss", "batch", "lr", "step")  # what every run measures
WHERE_NAMES = ("numel", "ndim", "depth", "block")
TARGETS = ("batch",)  # what rules may set
SELECTORS = ("type", "ndim", "role", "depth")
