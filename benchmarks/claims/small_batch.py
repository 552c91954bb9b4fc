"""Does it help to hold Adam's memory and the timescale of decay in tokens where the batch is another one?

The claims are those of Marek et al. (NeurIPS 2025, arXiv:2507.07101): batches far below the usual one train as well if
the half-life of Adam's second moment is held in tokens; and of Bergsma et al. (NeurIPS 2025, arXiv:2505.13738): the
timescale of weight decay is a number of tokens. A batch ramp changes both in silence. What is compared was fixed before
any run was looked at:

- All runs of a seed have the same weights at the start, samples in the same order, and tokens. Their rates are one
  schedule in tokens, times the square root of batch / reference.
- `fixed` is the reference batch. `ramp` grows from it to eight times as many samples, linearly in tokens. `small` is a
  quarter of it. Each of the two is run as it is, with `beta2 = half_life`, and with `decay = linear` as well. `seesaw`
  grows where the schedule falls; it is run plain and with both held.
- A run is judged by its loss on held-out windows, the mean of its last three looks. Runs of one seed are compared; what
  is reported is the mean of their differences with its interval: below 0 is better.
- The rate is the one that is best for `fixed` on seed 0, which is not compared.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.claims.figures import LEVEL, beyond, over_seeds, trailing_mean
from benchmarks.claims.training import (
    HeldOut,
    Model,
    Records,
    definition,
    key_of,
    parser,
    seeds,
    text,
    train,
    write,
)
from benchmarks.measure import Json
from examples.data import Data
from trainc.compiler.program.program import Program

NAME = "small_batch"
EXPECTED = "a lower loss with half-life and timescale held than without, on the ramp and on the small batch"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SPEC = """train 1
data "examples.data:stdlib" { batch = %(batch)s, micro = %(micro)d samples, context = %(context)d }
loss cross_entropy
run { length = %(tokens)d tokens, seed = %(seed)d }
optimizer adamw {
    lr = %(rate)g * (warmup(5%%) then cosine(to = 5%%)),
    betas = [0.9, 0.99], weight_decay = 0.5 on ndim(2), clip = 1.0,
}
%(scaling)s
"""
SCALING = "lr batch_scaling { rule = %s, reference = %d samples%s }"
HELD = {"": "", "half-life": ", beta2 = half_life", "both": ", beta2 = half_life, decay = linear"}
POLICIES = (
    "fixed", "ramp", "ramp, half-life", "ramp, both", "small", "small, half-life", "small, both", "seesaw",
    "seesaw, both",
)  # fmt: skip
COMPARED = {
    "half-life held on the ramp": ("ramp, half-life", "ramp"),
    "both held on the ramp": ("ramp, both", "ramp"),
    "half-life held on the small batch": ("small, half-life", "small"),
    "both held on the small batch": ("small, both", "small"),
    "both held under seesaw": ("seesaw, both", "seesaw"),
    "the ramp with both held against the fixed batch": ("ramp, both", "fixed"),
    "the small batch with both held against the fixed one": ("small, both", "fixed"),
    "seesaw with both held against the fixed batch": ("seesaw, both", "fixed"),
}
TOLD = ("both held on the ramp", "both held on the small batch")
"""The comparisons that are expected to be below 0."""
GROWTH, SHRINKAGE = 8, 4
SMOOTH = 3
"""Looks at the loss that are averaged."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A model, a length, and the reference batch in samples; `look` tokens lie between two looks at the loss."""

    model: Model
    tokens: int
    look: int
    windows: int
    reference: int


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
        setting, (policy, _, held) = self.setting, self.policy.partition(", ")
        reference = setting.reference
        largest = GROWTH * reference
        batch, micro = {
            "fixed": (f"{reference} samples", reference),
            "ramp": (f"ramp({reference} samples, to = {largest} samples, over = 100%)", reference),
            "small": (f"{reference // SHRINKAGE} samples", reference // SHRINKAGE),
            "seesaw": (f"seesaw(max = {largest} samples)", reference),
        }[policy]
        rule = "none" if policy == "seesaw" else "sqrt"
        scales = policy in ("ramp", "small") or held
        return SPEC % {
            "batch": batch,
            "micro": micro,
            "context": setting.model.context,
            "tokens": setting.tokens,
            "seed": self.seed,
            "rate": self.rate,
            "scaling": SCALING % (rule, reference, HELD[held]) if scales else "",
        }


FULL = Setting(Model(2, 48, 64), tokens=200_000, look=10_000, windows=64, reference=8)
SMALL = Setting(Model(1, 16, 16), tokens=4_096, look=512, windows=8, reference=8)


def carry_out(run: Run, data: Data, held_out: HeldOut) -> Json:
    """Train one run and return its curve: tokens, held-out loss, batch, and what is in force of beta2 and decay."""
    names = ("tokens", "loss", "batch", "beta2", "weight_decay")
    curve: dict[str, list[float]] = {name: [] for name in names}
    due = run.setting.look

    def look(program: Program, metrics: dict[str, float]) -> None:
        nonlocal due
        if program.clock.tokens < due:
            return
        due += run.setting.look
        curve["tokens"].append(program.clock.tokens)
        curve["loss"].append(round(held_out(program), 5))
        curve["batch"].append(metrics["batch"])
        curve["beta2"].append(metrics.get("adamw.beta2", 0.99))
        curve["weight_decay"].append(metrics.get("adamw.weight_decay", 0.5))

    spent = train(run.spec, run.setting.model, data, run.seed, look)
    return {"seconds": round(spent, 2), "curve": curve}


def end_of(record: Json) -> float:
    """Return the loss at the end of a run."""
    return trailing_mean(record["curve"]["loss"], SMOOTH)[-1]


class Take:
    """Takes runs, from the records where they are there."""

    def __init__(self, setting: Setting, records: Path) -> None:
        self.records = Records(records)
        self.data = text(setting.model.context)
        self.held_out = HeldOut(self.data, setting.windows)

    def __call__(self, run: Run) -> Json:
        """Return the record of a run and say how it ended."""
        record = self.records.get(key_of(run), partial(carry_out, run, self.data, self.held_out))
        name = f"rate {run.rate:g}, {run.policy}, seed {run.seed}"
        print(f"{name}: loss {end_of(record):.4f} after {record['seconds']:.1f} s", flush=True)
        return record


def measure(setting: Setting, count: int, records: Path) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    take = Take(setting, records)
    sweep = {rate: end_of(take(Run(setting, rate, "fixed", 0))) for rate in RATES}
    finite = {rate: loss for rate, loss in sweep.items() if math.isfinite(loss)}
    first = Run(setting, min(finite, key=finite.__getitem__), "fixed", 0)
    found: dict[str, list[Json]] = {policy: [] for policy in POLICIES}
    for seed in seeds(count):
        for policy in POLICIES:
            found[policy].append(take(replace(first, policy=policy, seed=seed)))
    ends = {policy: [end_of(record) for record in runs] for policy, runs in found.items()}
    gaps = {
        what: over_seeds([x - y for x, y in zip(ends[one], ends[other], strict=True)])
        for what, (one, other) in COMPARED.items()
    }
    return {
        "expected": EXPECTED,
        "met": {what: beyond(gaps[what], -1) for what in TOLD},
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "rate": first.rate,
        "loss of the fixed batch by rate, seed 0": {str(rate): x for rate, x in sweep.items()},
        "loss at the end": {policy: over_seeds(losses) for policy, losses in ends.items()},
        "differences of the loss": gaps,
        "seconds": {p: over_seeds([one["seconds"] for one in runs]) for p, runs in found.items()},
        "first seed": {policy: runs[0]["curve"] for policy, runs in found.items()},
    }


def main() -> None:
    """Take the runs and write the result."""
    given = parser(__doc__, NAME, 5).parse_args()
    records = given.records or given.out.with_suffix(".jsonl")
    found = measure(SMALL if given.small else FULL, given.seeds, records)
    write(given.out, NAME, found, given.note)
    print(json.dumps({"met": found["met"], **found["differences of the loss"]}, indent=1))


if __name__ == "__main__":
    main()
