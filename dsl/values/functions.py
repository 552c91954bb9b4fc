"""The signatures of the functions of expressions; a test compares them with the runtime's."""

from __future__ import annotations

from typing import Literal

from trainc.dsl.text.record import Record

ArgumentKind = Literal[
    "duration", "number", "points", "shape", "numbers", "amount", "plain", "samples", "switch"
]


class CallOf(Record):
    """The kind of an argument that is a call: messages call its functions a `noun`, as in `example`."""

    noun: str
    functions: dict[str, Function]
    example: str


class Function(Record):
    """A signature: arguments in order, how many may be positional, and how many are required.

    An argument whose kind is a `CallOf` is itself the call of one of some functions.
    """

    arguments: dict[str, ArgumentKind | CallOf]
    positional: int
    required: int
    schedule: bool = True


_DECAY: dict[str, ArgumentKind | CallOf] = {"to": "number", "over": "duration", "from": "number"}

FUNCTIONS: dict[str, Function] = {
    "warmup": Function({"over": "duration", "from": "number"}, 1, 1),
    "constant": Function({"value": "number", "over": "duration"}, 1, 0),
    "cosine": Function(_DECAY, 1, 0),
    "linear": Function(_DECAY, 1, 0),
    "cubic": Function(_DECAY, 1, 0),
    "exponential": Function(_DECAY, 1, 1),
    "inverse_sqrt": Function({"over": "duration"}, 1, 1),
    "step": Function({"at": "points", "factor": "number"}, 1, 2),
    "wsd": Function(
        {"warmup": "duration", "decay": "duration", "to": "number", "shape": "shape"},
        0,
        2,
    ),
    "min": Function({"x": "numbers"}, 1, 1, schedule=False),
    "max": Function({"x": "numbers"}, 1, 1, schedule=False),
    "sqrt": Function({"x": "number"}, 1, 1, schedule=False),
    "log": Function({"x": "number"}, 1, 1, schedule=False),
    "exp": Function({"x": "number"}, 1, 1, schedule=False),
    "abs": Function({"x": "number"}, 1, 1, schedule=False),
}

REMEMBERING: dict[str, Function] = {
    "best": Function({"x": "number"}, 1, 1, schedule=False),
    "since_best": Function({"x": "number"}, 1, 1, schedule=False),
    "mean": Function({"x": "number", "over": "duration"}, 2, 2, schedule=False),
}
"""Functions of what a number was before, which rules alone may call."""


def example_call(name: str) -> str:
    """Return a call of a function with the arguments it must have: `cosine()`, `warmup(over = ...)`."""
    function = (FUNCTIONS | REMEMBERING)[name]
    needed = list(function.arguments)[: function.required]
    return f"{name}({', '.join(f'{argument} = ...' for argument in needed)})"
