"""Does the influence of a training example on itself find wrong labels, better than the loss and than chance?

The claim is that of TracIn (Pruthi et al., NeurIPS 2020, arXiv:2002.08484): examples with a wrong label have a large
self-influence, the sum over checkpoints of the rate times the squared norm of their gradient. What is compared was
fixed before any run was looked at:

- Of the handwritten digits that are trained on, a tenth has another label, drawn evenly among the nine wrong ones. A
  multi-layer perceptron is trained on them by SGD with momentum, and leaves five checkpoints, evenly spread.
- Examples are ranked by their self-influence, of all parameters and of the last layer; by their loss at the last
  checkpoint; by the mean of their losses at all five, which costs as many passes as the self-influence; and at random.
- A ranking is judged by the part of the wrong labels that is among the first tenth and fifth of it, in percent, and by
  the area under the curve of that part over the part of the examples that was looked at: 50 % for chance, 95 % where
  all wrong ones come first. Runs of one seed share the labels, the model and the order of the data.
- The area with `half the run` is of the first three checkpoints: later ones are of a model that may know all labels.

Rates and length were set once, so that the run ends with labels learnt in part, and the same for all seeds.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.claims.figures import LEVEL, beyond, draw_rows, over_seeds
from benchmarks.claims.training import Records, definition, key_of, parser, seeds, write
from benchmarks.measure import Json
from examples.data import Data, Examples, digits
from trainc.compiler.driver.train import train
from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.influence.selection import parameters_of
from trainc.compiler.influence.tracin import Influence, TracIn

NAME = "influence"
EXPECTED = (
    "self-influence of all parameters finds more of the wrong labels than the loss, of one or of all checkpoints, and"
    " than chance"
)
SPEC = """train 1
model "examples.models:mlp" { width = %(width)d }
data "benchmarks.claims.influence:mislabelled" { batch = 32 samples, seed = %(seed)d, examples = %(examples)d }
loss cross_entropy
optimizer sgd { lr = 0.05 * (warmup(5%%) then cosine(to = 10%%)), momentum = 0.9 }
run { length = %(steps)d steps, seed = %(seed)d, checkpoint = 20%%, keep = 5, device = cpu }
"""
WRONG = 0.1
"""The part of the labels that is wrong."""
ALL, LAST, HALF = "self-influence", "self-influence, last layer", "self-influence, half the run"
LOSS, LOSSES, CHANCE = "loss, last checkpoint", "loss, mean of checkpoints", "random"
COMPARED = {
    "self-influence against the loss of the last checkpoint": (ALL, LOSS),
    "self-influence against the mean loss of all checkpoints": (ALL, LOSSES),
    "self-influence against chance": (ALL, CHANCE),
    "the last layer against all layers": (LAST, ALL),
    "half the run against the whole": (HALF, ALL),
}
TOLD = tuple(COMPARED)[:3]
"""The comparisons that are expected to be above 0."""
LOOKED_AT = (0.1, 0.2)


@dataclass(frozen=True, slots=True)
class Setting:
    """Width of the model, steps, and how many examples are trained on, 0 for all."""

    width: int = 64
    steps: int = 450
    examples: int = 0


SMALL = Setting(width=8, steps=10, examples=60)


def wrong_labels(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return labels of which a tenth is wrong, and which these are, bool."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=draw)[: round(WRONG * len(labels))]
    shift = torch.randint(1, 10, (len(chosen),), generator=draw)
    found = labels.clone()
    found[chosen] = (labels[chosen] + shift) % 10
    return found, found != labels


def mislabelled(seed: int = 0, examples: int = 0) -> Data:
    """Load the digits, some with a wrong label where they are trained on: the first ones, or all for 0."""
    data = digits(seed=seed)
    assert isinstance(data.train, Examples)
    count = examples or len(data.train)
    labels, _ = wrong_labels(data.train.targets[:count], seed)
    return Data(Examples(data.train.inputs[:count], labels), data.evaluation)


def _describe(seed: int = 0, examples: int = 0) -> dict[str, int]:
    return {"samples": examples or 1438, "tokens_per_sample": 1}


mislabelled.describe = _describe  # type: ignore[attr-defined]


def rankings(setting: Setting, seed: int, folder: Path) -> dict[str, list[float]]:
    """Train once and return what each ranking orders the examples by, larger first."""
    spec = SPEC % {
        "width": setting.width,
        "steps": setting.steps,
        "seed": seed,
        "examples": setting.examples,
    }
    (folder / "spec.train").write_text(spec)
    train(folder / "spec.train", folder / "run", quiet=True)
    run = RecordedRun.read(folder / "run")
    every = range(len(run.data.train))  # type: ignore[arg-type]
    found: dict[int, Influence] = {}
    steps = dict(run.checkpoints)
    names, inventory = parameters_of(run, None, last_layer=False)
    for step, path in steps.items():
        run.checkpoints = {step: path}
        found[step] = TracIn(run, names, inventory).measure(every)
    run.checkpoints = steps
    head, _ = parameters_of(run, None, last_layer=True)
    own = torch.stack([one.own for one in found.values()])
    losses = torch.stack([one.train_losses for one in found.values()])
    chance = torch.rand(len(every), generator=torch.Generator().manual_seed(seed))
    values = {
        ALL: own.sum(0),
        LAST: TracIn(run, head, inventory).measure(every).own,
        HALF: own[: -(-len(own) // 2)].sum(0),
        LOSS: losses[-1],
        LOSSES: losses.mean(0),
        CHANCE: chance,
    }
    return {name: one.tolist() for name, one in values.items()}


def judged(values: list[float], wrong: Tensor) -> Json:
    """Return the area under the curve, and the parts of the wrong labels at the top of a ranking, in percent."""
    order = torch.sort(torch.tensor(values), descending=True, stable=True).indices
    part = wrong[order].double().cumsum(0) / wrong.sum()
    told: Json = {"area": round(float(100 * part.mean()), 3)}
    for looked in LOOKED_AT:
        told[f"first {looked:.0%}"] = round(float(100 * part[round(looked * len(part)) - 1]), 3)
    return told


def carry_out(setting: Setting, seed: int) -> Json:
    """Train with the labels of a seed, and return how each ranking is judged."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = rankings(setting, seed, Path(folder))
    data = digits(seed=seed).train
    assert isinstance(data, Examples)
    _, wrong = wrong_labels(data.targets[: setting.examples or len(data)], seed)
    return {
        "rankings": {name: judged(values, wrong) for name, values in found.items()},
        "seconds": round(time.process_time() - begin, 2),
    }


def measure(setting: Setting, count: int, records: Path) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    kept, runs = Records(records), []
    for seed in seeds(count):
        runs.append(kept.get(key_of(setting, seed=seed), partial(carry_out, setting, seed)))
        areas = {name: one["area"] for name, one in runs[-1]["rankings"].items()}
        print(f"seed {seed}: {areas} in {runs[-1]['seconds']:.1f} s", flush=True)
    names = [*runs[0]["rankings"]]
    told = {
        figure: {name: [run["rankings"][name][figure] for run in runs] for name in names}
        for figure in runs[0]["rankings"][ALL]
    }
    gaps = {
        what: over_seeds(
            [a - b for a, b in zip(told["area"][one], told["area"][other], strict=True)]
        )
        for what, (one, other) in COMPARED.items()
    }
    return {
        "expected": EXPECTED,
        "met": {what: beyond(gaps[what], 1) for what in TOLD},
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "measured": {
            "wrong labels found, %": {
                name: {figure: over_seeds(values[name]) for figure, values in told.items()}
                for name in names
            }
        },
        "differences of the area, in points": gaps,
        "seconds": over_seeds([run["seconds"] for run in runs]),
    }


def draw(found: Json, path: Path) -> None:
    """Draw the parts that each ranking finds."""
    from matplotlib.figure import Figure

    rows = found["measured"]["wrong labels found, %"]
    figures = [*rows[ALL]]
    figure = Figure(figsize=(12, 3), layout="tight")
    for axes, name in zip(figure.subplots(1, len(figures), sharey=True), figures, strict=True):
        draw_rows(axes, {ranking: row[name] for ranking, row in rows.items()})
        axes.set_xlabel(f"wrong labels, {name}, %")
    figure.savefig(path, dpi=160)


def main() -> None:
    """Take the runs and write the result."""
    given = parser(__doc__, NAME, 10).parse_args()
    records = given.records or given.out.with_suffix(".jsonl")
    found = measure(SMALL if given.small else Setting(), given.seeds, records)
    write(given.out, NAME, found, given.note)
    draw(found, given.out.with_suffix(".png"))
    print(
        json.dumps({"met": found["met"], **found["differences of the area, in points"]}, indent=1)
    )


if __name__ == "__main__":
    main()
