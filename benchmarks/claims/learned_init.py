"""Does a start that Reptile learns fit new tasks faster than joint training with as many gradient steps?

The claim is that of Nichol, Achiam and Schulman (2018, arXiv:1803.02999): steps towards where tasks lead find weights
from which few steps fit a new one. Joint training on all tasks is the plain way to a start, and comparisons often give
it fewer steps. What is compared was fixed before any run was looked at:

- Tasks are sine waves of random amplitude and phase, 10 points to train on and 10 others to judge by; the model has two
  hidden layers of 40 units.
- `Reptile` is `trainc learn-init`: 8 steps on each task, at a rate from 0.5 to 0. `joint` takes as many gradient
  steps in all, each on as many points, drawn from the points of the same tasks together. `random` takes none.
- Both use SGD at the rate that is best for each on seed 0, which is not compared: by the error on other tasks after 8
  steps at 0.02.
- Each start is then fitted to 50 new tasks, by SGD at 0.02 on all 10 points. What is compared is the mean squared error
  on the other points after 0, 8 and 32 steps; below 0 is better.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import trainc
from benchmarks.claims.figures import LEVEL, beyond, over_seeds
from benchmarks.claims.training import Records, definition, key_of, parser, seeds, write
from benchmarks.measure import Json
from examples.data import sines
from trainc.compiler.learn.learn_init import learn_start
from trainc.compiler.learn.tasks import Weights

NAME = "learned_init"
EXPECTED = "a lower error of Reptile than of joint training after 8 steps, at equal gradient steps"
Method = Literal["Reptile", "joint", "random"]
METHODS: tuple[Method, ...] = ("Reptile", "joint", "random")
RATES = (0.01, 0.02, 0.05)
AFTER = (0, 8, 32)
INNER, FRACTION, FIT_RATE = 8, 0.5, 0.02
FIRST_NEW = 1_000_000
"""The number of the first task that no start has seen."""
SPEC = """train 1
model "benchmarks.claims.learned_init:network"
data "benchmarks.claims.learned_init:family" { batch = 10 samples, first = %(first)d }
loss mse
optimizer sgd { lr = %(rate)g }
run { length = %(inner)d steps, seed = %(seed)d }
"""


def network() -> nn.Sequential:
    """Return the model: (B, 1) to (B, 1)."""
    return nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    )


def family(task: int = 0, first: int = 0) -> object:
    """Return the points of a task; those of one seed begin at `first`."""
    return sines(first + task)


@dataclass(frozen=True, slots=True)
class Run:
    """One start: how it is found, over how many tasks, at which rate, and the new tasks that it is fitted to."""

    method: Method
    tasks: int
    rate: float
    seed: int
    new: int

    @property
    def first(self) -> int:
        """Return the number of its first task."""
        return self.seed * 10_000


def learned(run: Run) -> Weights:
    """Return what `trainc learn-init` finds."""
    values = {"first": run.first, "rate": run.rate, "inner": INNER, "seed": run.seed}
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "family.train"
        spec.write_text(SPEC % values)
        return learn_start(spec, tasks=run.tasks, inner=INNER, rate=FRACTION)[0]


def jointly(run: Run) -> Weights:
    """Return where as many steps lead on the points of all tasks together."""
    torch.manual_seed(run.seed)
    program = trainc.compile(
        f"loss mse optimizer sgd {{ lr = {run.rate:g} }} run {{ length = {run.tasks * INNER} steps }}",
        network(),
    )
    parts = [sines(run.first + task)[0] for task in range(run.tasks)]
    x, y = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    drawn = torch.Generator().manual_seed(run.seed)
    for _ in range(run.tasks * INNER):
        at = torch.randint(len(x), (10,), generator=drawn)
        program.step((x[at], y[at]))
    return dict(program.module.state_dict())


def fitted(start: Weights, tasks: int) -> list[float]:
    """Return the mean error on the other points of new tasks after 0, 8 and 32 steps on theirs."""
    sums = [0.0] * len(AFTER)
    for task in range(FIRST_NEW, FIRST_NEW + tasks):
        model, (own, others) = network(), sines(task)
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=FIT_RATE)
        for step in range(AFTER[-1] + 1):
            if step in AFTER:
                sums[AFTER.index(step)] += _error(model, others.inputs, others.targets)
            optimizer.zero_grad()
            mse_loss(model(own.inputs), own.targets).backward()
            optimizer.step()
    return [one / tasks for one in sums]


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(mse_loss(model(x), y))


def carry_out(run: Run) -> Json:
    """Find one start, and return the errors of new tasks."""
    if run.method == "random":
        torch.manual_seed(run.seed)
        start: Weights = dict(network().state_dict())
    else:
        start = learned(run) if run.method == "Reptile" else jointly(run)
    return {"errors": [round(one, 5) for one in fitted(start, run.new)]}


def measure(tasks: int, new: int, count: int, records: Path) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    kept = Records(records)

    def take(run: Run) -> list[float]:
        errors: list[float] = kept.get(key_of(run), partial(carry_out, run))["errors"]
        print(f"{run.method}, rate {run.rate:g}, seed {run.seed}: {errors}", flush=True)
        return errors

    rates = {}
    for method in METHODS[:2]:
        tried = {rate: take(Run(method, tasks, rate, 0, new))[1] for rate in RATES}
        rates[method] = min(tried, key=tried.__getitem__)
    found: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for seed in seeds(count):
        for method in METHODS:
            run = Run(method, tasks, rates.get(method, 0.0), seed, new)
            found[method].append(take(replace(run)))
    gaps = {
        f"Reptile to {other}": {
            f"after {steps} steps": over_seeds(
                [a[i] - b[i] for a, b in zip(found["Reptile"], found[other], strict=True)]
            )
            for i, steps in enumerate(AFTER)
        }
        for other in METHODS[1:]
    }
    return {
        "expected": EXPECTED,
        "met": {
            "Reptile below joint training after 8 steps": beyond(
                gaps["Reptile to joint"]["after 8 steps"], -1
            )
        },
        "level of the intervals": LEVEL,
        "setting": {"tasks": tasks, "inner": INNER, "new tasks": new, "rates": rates},
        "definition": definition(__doc__),
        "errors": {
            "by start": {
                method: {
                    f"after {steps} steps": over_seeds([run[i] for run in runs])
                    for i, steps in enumerate(AFTER)
                }
                for method, runs in found.items()
            },
            "differences": gaps,
        },
    }


def main() -> None:
    """Take the runs and write the result."""
    given = parser(__doc__, NAME, 5).parse_args()
    records = given.records or given.out.with_suffix(".jsonl")
    tasks, new = (4, 3) if given.small else (500, 50)
    found = measure(tasks, new, given.seeds, records)
    write(given.out, NAME, found, given.note)
    print(json.dumps({"met": found["met"], **found["errors"]}, indent=1))


if __name__ == "__main__":
    main()
