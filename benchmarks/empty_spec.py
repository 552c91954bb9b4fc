"""A spec without methods against the loop anybody writes: how much does `program.step` add?"""

from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import cross_entropy

import trainc
from benchmarks.measure import Json, Times, compared_over, in_processes, in_turn, seconds, timed
from examples.models import gpt

EXPECTED = "median ratio of step times at most 1.01"
GOAL = 1.01
PROCESSES = 5
SPEC = """train 1
data "examples.data:stdlib" { batch = %d samples, context = %d }
run { length = 100k steps }
loss cross_entropy
optimizer adamw { lr = 1e-4, weight_decay = 0.01 }
"""
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """A model and a batch."""

    layers: int
    width: int
    context: int
    samples: int
    rounds: int


SIZES = {
    "about 5 ms": Size(layers=2, width=64, context=32, samples=4, rounds=120),
    "about 50 ms": Size(layers=4, width=192, context=64, samples=8, rounds=24),
}


class ByHand:
    """The loop anybody writes; it reads its loss, as a loop that logs does."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)

    def step(self, batch: Batch) -> float:
        """Train on one batch."""
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        # Last, as the program does: gradients that stay would crowd the other's turn.
        self.optimizer.zero_grad()
        return loss.item()


def small_gpt(size: Size) -> torch.nn.Module:
    """Build the same model each time."""
    torch.manual_seed(0)
    return gpt(size.layers, size.width, heads=4, context=size.context)


def random_text(size: Size) -> Batch:
    """Return a batch of random bytes."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (size.samples, size.context + 1), generator=source)
    return ids[:, :-1], ids[:, 1:]


def measure() -> Json:
    """Measure all sizes on one thread."""
    found = {name: _measure(size) for name, size in SIZES.items()}
    worst = max(one["ratio"]["cpu"]["median"] for one in found.values())
    return {"expected": EXPECTED, "met": worst <= GOAL, "measured": found}


def _measure(size: Size) -> Json:
    times = in_processes("benchmarks.empty_spec:steps", PROCESSES, size=asdict(size))
    return {
        "size": asdict(size),
        "seconds": {name: seconds([t for one in times for t in one[name]]) for name in times[0]},
        "ratio": compared_over(times, "program", "by hand"),
        "ratio of two equal loops": compared_over(times, "by hand again", "by hand"),
    }


def steps(size: Json) -> dict[str, list[Times]]:
    """Time the steps of each in turn."""
    torch.set_num_threads(1)
    wanted = Size(**size)
    batch = random_text(wanted)
    hand, twin = ByHand(small_gpt(wanted)), ByHand(small_gpt(wanted))
    program = trainc.compile(SPEC % (wanted.samples, wanted.context), small_gpt(wanted))

    def once(step: object) -> Times:
        return timed(lambda: step(batch))  # type: ignore[operator]

    versions = {
        "by hand": lambda: once(hand.step),
        "program": lambda: once(program.step),
        "by hand again": lambda: once(twin.step),
    }
    return in_turn(versions, wanted.rounds, warm_up=20)
