"""What methods cost: step times with the noise scale, PACE and SIFT against the plain step."""

from typing import Literal

import torch

import trainc
from benchmarks.empty_spec import SPEC, Size, random_text, small_gpt
from benchmarks.measure import Json, Times, compared, in_turn, seconds, timed

EXPECTED = (
    "gns near 1 (its statistics ride on the norms' backward pass), "
    "pace near 2 (every example passes twice), sift near 1; graph and modules alike"
)
METHODS = {
    "gns": "noise_scale gns on type(LayerNorm) { smooth = 30 steps }",
    "pace": (
        'regularize pace on "blocks.*.mlp.**" & type(Linear) '
        "{ sigma = 0.3 * (1 - depth), weight = 0.02 }"
    ),
    "sift": 'mask sift on "blocks.**" & ndim(2) { density = 5% }',
}
Executor = Literal["graph", "module"]
EXECUTORS: tuple[Executor, ...] = ("graph", "module")
ROUNDS = 60
SIZE = Size(layers=4, width=192, context=64, samples=8, rounds=ROUNDS)


def measure() -> Json:
    """Measure each method by both executors on one thread."""
    torch.set_num_threads(1)
    batch = random_text(SIZE)
    empty = SPEC % (SIZE.samples, SIZE.context)
    programs = {
        (name, executor): trainc.compile(f"{empty}{text}\n", small_gpt(SIZE), executor=executor)
        for name, text in {"plain": "", **METHODS}.items()
        for executor in EXECUTORS
    }

    def once(key: tuple[str, Executor]) -> Times:
        return timed(lambda: programs[key].step(batch))

    times = in_turn(
        {f"{key[0]}, {key[1]}": lambda key=key: once(key) for key in programs},  # type: ignore[misc]
        ROUNDS,
        warm_up=8,
    )
    plain = times["plain, module"]
    return {
        "expected": EXPECTED,
        "met": None,
        "measured": {
            name: {"ratio to the plain step": compared(found, plain), "seconds": seconds(found)}
            for name, found in times.items()
        },
    }
