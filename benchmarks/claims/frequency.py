"""Are low frequencies learned first, also where the amplitudes rise with the frequency, and without gradients?

The claim is that of Ma, Xu and Zhang (2021, arXiv:2101.00747): low frequencies of a target come first under methods
with and without gradients, so that the order is not the optimizer's. In the published example the amplitudes fall with
the frequency, which may be the reason by itself. What is compared was fixed before any run was looked at:

- 64 points of sin x, sin 3x and sin 5x, with the amplitudes 1, 0.6, 0.4 (`falling`) or 0.4, 0.6, 1 (`rising`), and a
  network of 12 hidden units, all of it in every step. Runs of one seed have the same weights at the start.
- Adam, conjugate gradients and BFGS read gradients; Powell's method and a particle swarm do not. Each has a number of
  steps of its own, in which about the same processor time goes.
- A frequency is learned at the first step after which its error is below 0.1, below 0.2 for the swarm. `order` is the
  rank correlation of frequency and that step, those that are not learned last: 1 is low first, -1 high first.
- The order has to be above 0 by more than its interval over seeds, for each method and both profiles.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import trainc
from benchmarks.claims.figures import LEVEL, beyond, over_seeds
from benchmarks.claims.training import Records, definition, key_of, parser, seeds, write
from benchmarks.measure import Json
from examples.data import curve_points, rising_curve_points
from examples.models import tanh_net

NAME = "frequency"
EXPECTED = (
    "an order above 0 for each method, whether the amplitudes fall or rise with the frequency"
)
Profile = Literal["falling", "rising"]
PROFILES: tuple[Profile, ...] = ("falling", "rising")
FUNCTIONS = {"falling": "curve_points", "rising": "rising_curve_points"}
SPEC = """train 1
loss mse
optimizer %(optimizer)s
observe frequency every 1 steps { probe = "examples.data:%(probe)s", threshold = %(threshold)g }
run { length = %(steps)d steps, seed = %(seed)d }
"""
OPTIMIZERS = {
    "Adam": "adamw { lr = 1e-2 }",
    "CG": 'scipy { method = "CG" }',
    "BFGS": 'scipy { method = "BFGS" }',
    "Powell": 'scipy { method = "Powell" }',
    "swarm": "swarm { particles = 30, seed = %d }",
}
STEPS = {"Adam": 3000, "CG": 600, "BFGS": 400, "Powell": 12, "swarm": 200}
FEW = {"Adam": 30, "CG": 6, "BFGS": 6, "Powell": 1, "swarm": 3}
THRESHOLD = {"swarm": 0.2}


@dataclass(frozen=True, slots=True)
class Run:
    """One run: a method, the amplitudes of the target, its steps, and a seed."""

    method: str
    profile: Profile
    steps: int
    seed: int

    @property
    def spec(self) -> str:
        """Return the text of the run's spec."""
        optimizer = OPTIMIZERS[self.method]
        return SPEC % {
            "optimizer": optimizer % self.seed if "%" in optimizer else optimizer,
            "probe": FUNCTIONS[self.profile],
            "threshold": THRESHOLD.get(self.method, 0.1),
            "steps": self.steps,
            "seed": self.seed,
        }


def carry_out(run: Run) -> Json:
    """Train one run and return when each frequency was learned, the order, and the errors at the end."""
    torch.manual_seed(run.seed)
    program = trainc.compile(run.spec, tanh_net())
    batch = curve_points() if run.profile == "falling" else rising_curve_points()
    evaluations, losses = 0.0, [0.0]
    for _ in range(run.steps):
        metrics = program.step(batch)
        evaluations += max((v for n, v in metrics.items() if n.endswith(".evaluations")), default=1)
        losses.append(metrics["loss"])
    series = program.report().series
    learned = series["frequency.below"]
    names = list(series["frequency.error"])
    return {
        "learned": {name: learned.get(name) for name in names},
        "order": program.signals["frequency.order"],
        "error": {name: round(series["frequency.error"][name], 4) for name in names},
        "amplitude": series["frequency.amplitude"],
        "loss": losses[-1],
        "evaluations": evaluations,
    }


def measure(steps: dict[str, int], count: int, records: Path) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    kept = Records(records)
    found: dict[str, dict[str, list[Json]]] = {p: {m: [] for m in OPTIMIZERS} for p in PROFILES}
    for seed in seeds(count):
        for profile in PROFILES:
            for method, length in steps.items():
                run = Run(method, profile, length, seed)
                record = kept.get(key_of(run), partial(carry_out, replace(run)))
                found[profile][method].append(record)
                print(f"{method}, {profile}, seed {seed}: {record['learned']}", flush=True)
    order = {
        profile: {
            method: over_seeds([one["order"] for one in runs]) for method, runs in methods.items()
        }
        for profile, methods in found.items()
    }
    return {
        "expected": EXPECTED,
        "met": {
            f"{method}, {profile}": beyond(figure, 1)
            for profile, methods in order.items()
            for method, figure in methods.items()
        },
        "level of the intervals": LEVEL,
        "setting": key_of(Run("Adam", "falling", steps["Adam"], 0), steps_of_all=steps),
        "definition": definition(__doc__),
        "order": order,
        "lowest before highest": {
            profile: {m: over_seeds([first(one) for one in runs]) for m, runs in methods.items()}
            for profile, methods in found.items()
        },
        "learned at step": {
            p: {m: [one["learned"] for one in runs] for m, runs in methods.items()}
            for p, methods in found.items()
        },
        "evaluations": {
            p: {m: over_seeds([one["evaluations"] for one in runs]) for m, runs in methods.items()}
            for p, methods in found.items()
        },
    }


def first(record: Json) -> float:
    """Return 1 where the lowest frequency was learned before the highest, 0 where it was not, 1/2 for neither."""
    low, *_, high = (float("inf") if at is None else at for at in record["learned"].values())
    return 0.5 if low == high else float(low < high)


def main() -> None:
    """Take the runs and write the result."""
    given = parser(__doc__, NAME, 5).parse_args()
    records = given.records or given.out.with_suffix(".jsonl")
    found = measure(FEW if given.small else STEPS, given.seeds, records)
    write(given.out, NAME, found, given.note)
    print(json.dumps({"met": found["met"], "order": found["order"]}, indent=1))


if __name__ == "__main__":
    main()
