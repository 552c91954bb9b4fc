"""Does a large batch generalize worse on digits, and do ghost batches, a larger rate or more steps close the gap?

The claims are those of Hoffer, Hubara and Soudry (NeurIPS 2017, arXiv:1705.08741): with the rate and the number of
epochs of a small batch a large one generalizes worse; the rate times sqrt(batch / small), statistics of BatchNorm over
ghost batches of the small size, and as many steps as the small batch takes each close a part of the gap. What is
compared was fixed before any run of the compared seeds was looked at; the length was chosen on seed 0, to fit minutes:

- A net of two convolutions with BatchNorm on 718 of scikit-learn's digits, SGD with momentum and a cosine to 0 over the
  run; the other 1079 digits are held out. Runs of one seed have the same weights at the start and the same split.
- `small` has 16 examples a step, the others 256. `plain` has the rate and the epochs of `small`. `sqrt` has 4 times the
  rate, `ghost` also ghost batches of 16, and `ghost, longer` also 16 times the epochs, which is as many steps as
  `small` takes. `longer` is `sqrt` with 16 times the epochs, without ghost batches.
- A run is judged by its accuracy on held-out digits after its last step. Runs of one seed are compared; what is
  reported is the mean of their differences, in points, with its interval: above 0 is better.
- The rate is the one that is best for `small` on seed 0, which is not compared.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import trainc
from benchmarks.claims.figures import LEVEL, beyond, draw_rows, over_seeds
from benchmarks.claims.training import Records, definition, key_of, parser, seeds, steps, write
from benchmarks.measure import Json
from examples.data import Data, digits

NAME = "ghost"
EXPECTED = (
    "the large batch below the small one, and each remedy above the plain large batch: the rate, ghost batches with it,"
    " and more steps"
)
RATES = (0.02, 0.05, 0.1, 0.2)
HELD_OUT = 0.6
SPEC = """train 1
data "examples.data:digits" { batch = %(batch)d samples, evaluation_share = 0.6, seed = %(seed)d }
loss cross_entropy
optimizer sgd { lr = %(rate)g * cosine(), momentum = 0.9, weight_decay = 5e-4 on ndim(2) | ndim(4) }
run { length = %(epochs)d epochs, seed = %(seed)d }
%(more)s
"""
GHOST = "normalize ghost_batch { size = %(small)d, remainder = merge_last }"
SQRT = "lr batch_scaling { rule = sqrt, reference = %(small)d samples }"
POLICIES: Mapping[str, tuple[str, ...]] = {
    "small": (),
    "plain": (),
    "sqrt": (SQRT,),
    "ghost": (SQRT, GHOST),
    "longer": (SQRT,),
    "ghost, longer": (SQRT, GHOST),
}
COMPARED = {
    "the large batch against the small one": ("plain", "small"),
    "sqrt scaling against plain": ("sqrt", "plain"),
    "ghost batches against plain": ("ghost", "plain"),
    "ghost batches against sqrt scaling": ("ghost", "sqrt"),
    "longer against sqrt scaling": ("longer", "sqrt"),
    "ghost batches, longer, against longer": ("ghost, longer", "longer"),
    "ghost batches, longer, against the small batch": ("ghost, longer", "small"),
}
BELOW = ("the large batch against the small one",)
ABOVE = ("sqrt scaling against plain", "ghost batches against plain", "longer against sqrt scaling")
"""The comparisons that are expected below and above 0."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Channels of the net, examples of a small and of a large batch, and epochs of the shorter runs."""

    channels: int
    small: int
    large: int
    epochs: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the comparison."""

    setting: Setting
    rate: float
    policy: str
    seed: int

    @property
    def spec(self) -> str:
        """Return the text of the run's spec."""
        setting = self.setting
        longer = setting.large // setting.small if "longer" in self.policy else 1
        return SPEC % {
            "batch": setting.small if self.policy == "small" else setting.large,
            "seed": self.seed,
            "rate": self.rate,
            "epochs": longer * setting.epochs,
            "more": "\n".join(POLICIES[self.policy]) % {"small": setting.small}
            if POLICIES[self.policy]
            else "",
        }


FULL = Setting(channels=12, small=16, large=256, epochs=12)
SMALL = Setting(channels=4, small=16, large=64, epochs=1)


def net(channels: int, seed: int) -> nn.Sequential:
    """Build the net with the weights that belong to a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * channels, 10),
    )  # fmt: skip


def carry_out(run: Run) -> Json:
    """Train one run and return accuracies, in percent, and the steps that it took."""
    data: Data = digits(HELD_OUT, run.seed)
    model = net(run.setting.channels, run.seed)
    program = trainc.compile(run.spec, model, executor="module")
    begin, loss = time.process_time(), 0.0
    for metrics in steps(program, data, run.seed):
        loss = metrics["loss"]
    return {
        "seconds": round(time.process_time() - begin, 2),
        "steps": program.clock.steps,
        "held out": accuracy(model, data.evaluation),
        "trained": accuracy(model, data.train),
        "loss": round(loss, 5),
    }


@torch.no_grad()
def accuracy(model: nn.Module, split: object) -> float:
    """Return the percentage of a split's images that a model tells right, by running statistics."""
    x, y = split.batch(range(len(split)))  # type: ignore[attr-defined, arg-type]
    right = model.eval()(x).argmax(1) == y
    return round(100 * float(right.float().mean()), 3)


def take(run: Run, records: Records) -> Json:
    """Return the record of a run, made now if there is none, and say how it ended."""
    record = records.get(key_of(run), partial(carry_out, run))
    name = f"rate {run.rate:g}, {run.policy}, seed {run.seed}"
    print(f"{name}: {record['held out']:.2f}% after {record['steps']} steps", flush=True)
    return record


def measure(setting: Setting, count: int, records: Records) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    sweep = {rate: take(Run(setting, rate, "small", 0), records)["held out"] for rate in RATES}
    first = Run(setting, max(sweep, key=sweep.__getitem__), "small", 0)
    found: dict[str, list[Json]] = {policy: [] for policy in POLICIES}
    for seed in seeds(count):
        for policy in POLICIES:
            found[policy].append(take(replace(first, policy=policy, seed=seed), records))
    ends = {policy: [one["held out"] for one in runs] for policy, runs in found.items()}
    gaps = {
        what: over_seeds([x - y for x, y in zip(ends[one], ends[other], strict=True)])
        for what, (one, other) in COMPARED.items()
    }
    return {
        "expected": EXPECTED,
        "met": {what: beyond(gaps[what], -1) for what in BELOW}
        | {what: beyond(gaps[what], 1) for what in ABOVE},
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "rate": first.rate,
        "held-out accuracy of the small batch by rate, seed 0": {str(r): a for r, a in sweep.items()},
        "held-out accuracy": {policy: over_seeds(values) for policy, values in ends.items()},
        "accuracy on what was trained": {p: over_seeds([one["trained"] for one in runs]) for p, runs in found.items()},
        "steps": {policy: runs[0]["steps"] for policy, runs in found.items()},
        "differences of the held-out accuracy, in points": gaps,
        "seconds": {p: over_seeds([one["seconds"] for one in runs]) for p, runs in found.items()},
    }  # fmt: skip


def draw(found: Json, out: Path) -> None:
    """Draw accuracies and differences with their intervals; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    parts = "held-out accuracy", "differences of the held-out accuracy, in points"
    for axes, part in zip(figure.subplots(2, 1), parts, strict=True):
        draw_rows(axes, found[part])
        axes.set_xlabel(f"{part}: means over seeds, {100 * LEVEL:.0f}% intervals")
    figure.axes[1].axvline(0, color="gray", linewidth=0.8)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Take the runs, write the result and draw it."""
    given = parser(__doc__, NAME, 10).parse_args()
    records = Records(given.records or given.out.with_suffix(".jsonl"))
    found = measure(SMALL if given.small else FULL, given.seeds, records)
    write(given.out, NAME, found, given.note)
    draw(found, given.out.with_suffix(".png"))
    print(json.dumps({"met": found["met"], **found["held-out accuracy"]}, indent=1))


if __name__ == "__main__":
    main()
