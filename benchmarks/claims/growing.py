"""Runs in which the norm of a small GPT grows: what two observers see of one training, for two claims.

`norm_growth` and `saturation` read one file of records, so that each run is carried out once.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

import trainc
from benchmarks.claims.training import (
    HeldOut,
    Model,
    Records,
    key_of,
    parser,
    seeds,
    steps,
    text,
    write,
)
from benchmarks.measure import Json

RECORDS = "growing.jsonl"
"""The file of finished runs, beside the results."""
SPEC = """train 1
data "examples.data:stdlib" { batch = %(batch)d samples, context = %(context)d }
loss cross_entropy
run { length = %(steps)d steps, seed = %(seed)d }
optimizer adamw { lr = %(rate)s, weight_decay = %(decay)g on ndim(2), clip = 1 }
observe norm_growth every %(every)d steps { params = encoder }
observe saturation every %(every)d steps { layers = "blocks.*" }
"""
RATES = {"constant rate": "3e-3", "1/sqrt(t) rate": "3e-3 * inverse_sqrt(over = 50 steps)"}
DECAYS = (0.0, 0.1)
LARGE = 1000.0
"""What the weights of a saturated network are multiplied by, as published."""
Curve = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Setting:
    """The model, its training, and how often it is observed."""

    layers: int = 2
    width: int = 64
    context: int = 64
    batch: int = 16
    steps: int = 1200
    every: int = 10
    windows: int = 32


SMALL = Setting(layers=1, width=32, context=16, batch=4, steps=12, every=2, windows=4)


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    setting: Setting
    rate: str
    decay: float
    seed: int

    @property
    def spec(self) -> str:
        """Return the text of the spec."""
        return SPEC % {
            "batch": self.setting.batch, "context": self.setting.context, "steps": self.setting.steps,
            "every": self.setting.every, "seed": self.seed, "rate": RATES[self.rate], "decay": self.decay,
        }  # fmt: skip


def name_of(rate: str, decay: float) -> str:
    """Return what the runs of a rate and a weight decay are called."""
    return f"{rate}, decay {decay:g}"


def of_all(setting: Setting, count: int, records: Records) -> dict[str, list[Json]]:
    """Return the records of all runs, by rate and decay; those of a name are in the order of the seeds."""
    torch.set_num_threads(1)
    found: dict[str, list[Json]] = {name_of(r, d): [] for r in RATES for d in DECAYS}
    for seed in seeds(count):
        for rate in RATES:
            for decay in DECAYS:
                run = Run(setting, rate, decay, seed)
                record = records.get(key_of(run), partial(carry_out, run))
                name = name_of(rate, decay)
                found[name].append(record)
                norms = record["norm"]["norm"]
                print(f"{name}, seed {seed}: norm {norms[0]:.4g} -> {norms[-1]:.4g}", flush=True)
    return found


def carry_out(run: Run) -> Json:
    """Train a model and return what was seen of it.

    `norm` has what `observe norm_growth` found, `saturation` what `observe saturation` found in training batches, and
    `held out` the cosines of `pairs`; each with the number of the update that it is of.
    """
    setting = run.setting
    data, model = text(setting.context), Model(setting.layers, setting.width, setting.context)
    program = trainc.compile(run.spec, model.build(run.seed), executor="module")
    held_out = HeldOut(data, setting.windows)
    norm, saturation, others = Seen(), Seen(), Seen()
    others.add(0, pairs(program.module, held_out.batch[0]))
    begin = time.process_time()
    for metrics in steps(program, data, run.seed):
        if "norm_growth.norm" in metrics:
            # The norm is that after the update, saturation that of the pass before it.
            updates = program.clock.steps
            norm.add(updates, _of(metrics, "norm_growth", ("norm", "step", "alignment")))
            saturation.add(updates - 1, _of(metrics, "saturation", ("", "hidden")))
            if updates > 1:
                others.add(updates, pairs(program.module, held_out.batch[0]))
    return {
        "norm": norm.curve,
        "saturation": saturation.curve,
        "held out": others.curve,
        "loss": held_out(program),
        "seconds": round(time.process_time() - begin, 2),
    }


class Seen:
    """What was measured, by name, one number for each of the updates `at`."""

    def __init__(self) -> None:
        self.curve: Curve = {"at": []}

    def add(self, updates: int, found: Mapping[str, float]) -> None:
        """Add what was found after so many updates; a first observation may lack some of it."""
        self.curve["at"].append(updates)
        for name, value in found.items():
            self.curve.setdefault(name, []).append(float(f"{value:.7g}"))


def _of(metrics: Mapping[str, float], clause: str, signals: Iterable[str]) -> dict[str, float]:
    full = {signal: f"{clause}.{signal}" if signal else clause for signal in signals}
    return {signal or "output": metrics[name] for signal, name in full.items() if name in metrics}


def pairs(module: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Return mean cosines of the logits of tokens with saturated ones: of the same token, and of another window's.

    What all tokens have in common, such as logits by frequency, is in both; what a saturated network says of its
    input is in the difference.
    """
    large = {name: LARGE * one for name, one in module.state_dict().items()}
    module.eval()
    with torch.no_grad():
        plain, saturated = (
            module(inputs).double(),
            functional_call(module, large, (inputs,)).double(),
        )
    module.train()
    own = cosine_similarity(plain, saturated, dim=-1)
    other = cosine_similarity(plain, saturated.roll(1, 0), dim=-1)
    return {"same token": float(own.mean()), "another token": float(other.mean())}


def tenth(values: Sequence[float], place: int) -> float:
    """Return the mean of the first tenth of some numbers, place 0, or of the last, place -1."""
    count = max(1, len(values) // 10)
    return fmean(values[:count] if place == 0 else values[-count:])


def take_claim(
    page: str | None,
    name: str,
    measure: Callable[[Setting, int, Records], Json],
    draw: Callable[[Json, Path], None],
) -> None:
    """Take the runs that are not there yet, write a claim's result and draw it; `page` is its definition."""
    given = parser(page, name, 5).parse_args()
    records = Records(given.records or given.out.with_name(RECORDS))
    found = measure(SMALL if given.small else Setting(), given.seeds, records)
    write(given.out, name, found, given.note)
    draw(found, given.out.with_suffix(".png"))
    print(json.dumps(found["met"], indent=1))
