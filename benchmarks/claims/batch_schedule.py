"""Does a batch that grows with the noise save tokens? A fixed batch, the published ramp and a closed loop.

The claim is Gray et al.'s (NeurIPS 2024, arXiv:2411.00999): 18 % of the tokens saved by a batch that
grows linearly in tokens. What is compared was fixed before any run was looked at:

- The curve of a run is its loss on held-out windows at multiples of `look` tokens, each point the
  mean of the last three. Its tokens and its processor seconds of training, without those of the
  first step, go with it.
- The loss at which two runs of one seed are compared is that of the fixed batch at its end, or that
  of the other run at its end if that one never gets there. What is saved is 1 - (tokens of the other
  run to that loss) / (tokens of the fixed batch to it): negative where the fixed batch was faster.
- Both runs of a seed see the same samples in the same order from the same weights. All runs have
  one micro-batch and one schedule of rates in tokens: a warm-up and a line down to a tenth.
- The rate is the one that is best for the fixed batch on seed 0, which is not compared.
- `fixed, half` is a control: the fixed batch of about the ramp's mean size, at the same rate. What a
  policy does not save against it too, a smaller fixed batch would have saved as well.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.claims.figures import LEVEL, first_crossing, over_seeds, trailing_mean
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

GOAL = 0.18
EXPECTED = "at least 18 % of the tokens saved on average, by the ramp or by the closed loop"
NAME = "batch_schedule"
OPTIMIZERS = {
    "adamw": "optimizer adamw { lr = %s, betas = [0.9, 0.95], weight_decay = 0.1 on ndim(2), clip = 1.0 }",
    "sgd": "optimizer sgd { lr = %s, momentum = 0.9, clip = 1.0 }",
}
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), "sgd": (0.05, 0.1, 0.2, 0.4, 0.8)}
SHAPE = "(warmup(5%%) then linear(to = 10%%))"
SPEC = """train 1
data "examples.data:stdlib" { batch = %(batch)s, micro = %(micro)d samples, context = %(context)d }
loss cross_entropy
run { length = %(tokens)d tokens, seed = %(seed)d }
%(optimizer)s
%(more)s
"""
MEASURE = "noise_scale gns on role(norm) { smooth = %d tokens }"
COUPLING = "lr batch_scaling { rule = sqrt, reference = %d samples }"
CONTROL = "fixed, half"
AGAINST = f"tokens saved against `{CONTROL}`"
POLICIES = ("fixed", CONTROL, "ramp", "follow", "ramp, coupled", "follow, coupled")
SMOOTH = 3
"""Points of a curve that are averaged."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A model, a length and the batches, in samples; `look` tokens lie between two looks at the loss."""

    model: Model
    tokens: int
    look: int
    windows: int
    least: int
    fixed: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the comparison."""

    setting: Setting
    optimizer: str
    rate: float
    policy: str
    seed: int

    @property
    def spec(self) -> str:
        """Return the text of the run's spec."""
        setting, more = self.setting, []
        if self.policy.startswith("follow"):
            more.append(MEASURE % (setting.tokens // 20))
        if self.policy.endswith("coupled"):
            more.append(COUPLING % setting.fixed)
        return SPEC % {
            "batch": self.batch,
            "micro": setting.least,
            "context": setting.model.context,
            "tokens": setting.tokens,
            "seed": self.seed,
            "optimizer": OPTIMIZERS[self.optimizer] % f"{self.rate} * {SHAPE % ()}",
            "more": "\n".join(more),
        }

    @property
    def batch(self) -> str:
        """Return the batch or its policy."""
        least, fixed = self.setting.least, self.setting.fixed
        match self.policy.partition(",")[0]:
            case "ramp":
                return f"ramp({least} samples, to = {fixed} samples, over = 100%)"
            case "follow":
                return f"follow(gns, min = {least} samples, max = {fixed} samples)"
        return f"{fixed // 2 if self.policy == CONTROL else fixed} samples"


FULL = Setting(Model(2, 48, 64), tokens=800_000, look=20_000, windows=128, least=4, fixed=32)
SMALL = Setting(Model(1, 16, 16), tokens=4_096, look=512, windows=8, least=2, fixed=8)


def carry_out(run: Run, data: Data, held_out: HeldOut) -> Json:
    """Train one run and return its curve: tokens, seconds, held-out loss, batch and noise scale."""
    curve: dict[str, list[float]] = {n: [] for n in ("tokens", "seconds", "loss", "batch", "gns")}
    due = run.setting.look

    def look(program: Program, metrics: dict[str, float]) -> None:
        nonlocal due
        if program.clock.tokens < due:
            return
        due += run.setting.look
        curve["tokens"].append(program.clock.tokens)
        curve["seconds"].append(round(metrics["seconds"], 3))
        curve["loss"].append(round(held_out(program), 5))
        curve["batch"].append(metrics["batch"])
        scale = metrics.get("gns", math.nan)
        curve["gns"].append(round(scale, 3) if math.isfinite(scale) else -1.0)

    spent = train(run.spec, run.setting.model, data, run.seed, look)
    return {"seconds": round(spent, 2), "curve": curve}


def compare(other: Json, fixed: Json) -> dict[str, float]:
    """Return the shares of tokens and of seconds a run saved against the fixed batch, and its loss beyond it."""
    curves = [record["curve"] for record in (other, fixed)]
    losses = [trailing_mean(curve["loss"], SMOOTH) for curve in curves]
    level = max(one[-1] for one in losses)
    found = {"loss beyond the fixed batch's": losses[0][-1] - losses[1][-1]}
    for unit in ("tokens", "seconds"):
        ours, theirs = (
            first_crossing(c[unit], y, level) for c, y in zip(curves, losses, strict=True)
        )
        found[f"{unit} saved"] = 1 - ours / theirs
    return found


def choose_rate(optimizer: str, setting: Setting, take: "Take") -> tuple[float, Json]:
    """Return the rate that is best for the fixed batch on seed 0, and the loss at each."""
    ends: dict[float, float] = {}
    for rate in RATES[optimizer]:
        curve = take(Run(setting, optimizer, rate, "fixed", 0))["curve"]
        ends[rate] = trailing_mean(curve["loss"], SMOOTH)[-1]
    finite = {rate: loss for rate, loss in ends.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__), {str(rate): loss for rate, loss in ends.items()}


class Take:
    """Takes runs, from the records where they are there."""

    def __init__(self, setting: Setting, records: Path) -> None:
        self.records = Records(records)
        self.data = text(setting.model.context)
        self.held_out = HeldOut(self.data, setting.windows)

    def __call__(self, run: Run) -> Json:
        """Return the record of a run and say how it ended."""
        record = self.records.get(key_of(run), partial(carry_out, run, self.data, self.held_out))
        name = f"{run.optimizer}, rate {run.rate:g}, {run.policy}, seed {run.seed}"
        end = record["curve"]["loss"][-1]
        print(f"{name}: loss {end:.4f} after {record['seconds']:.1f} s", flush=True)
        return record


def measure(setting: Setting, count: int, records: Path, optimizers: list[str]) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    take, measured = Take(setting, records), {}
    for optimizer in optimizers:
        rate, sweep = choose_rate(optimizer, setting, take)
        first = Run(setting, optimizer, rate, "fixed", 0)
        found: dict[str, list[Json]] = {policy: [] for policy in POLICIES}
        for seed in seeds(count):
            for policy in POLICIES:
                found[policy].append(take(replace(first, policy=policy, seed=seed)))
        measured[optimizer] = {
            "rate": rate,
            "loss of the fixed batch by rate, seed 0": sweep,
            "fixed": _ends(found["fixed"]),
            CONTROL: _summary(found[CONTROL], found["fixed"]),
            **{
                p: _summary(found[p], found["fixed"]) | {AGAINST: _saved(found[p], found[CONTROL])}
                for p in POLICIES[2:]
            },
        }
    return {
        "expected": EXPECTED,
        "met": {name: _met(one) for name, one in measured.items()},
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "measured": measured,
    }


def _met(found: Json) -> Json:
    """Return for every policy whether its mean saving reaches the goal, and which intervals are above 0."""
    told = {}
    for policy in POLICIES[2:]:
        saved, beyond = found[policy]["tokens saved"], found[policy][AGAINST]
        told[policy] = {
            "mean at the goal": saved["mean"] >= GOAL,
            "saves at all": _above_zero(saved),
            "saves against the control": _above_zero(beyond),
        }
    return told


def _above_zero(figure: Json) -> bool:
    return figure["interval"] is not None and figure["interval"][0] > 0


def _ends(records: list[Json]) -> Json:
    """Return the final losses and the seconds of runs."""
    losses = [trailing_mean(record["curve"]["loss"], SMOOTH)[-1] for record in records]
    return {
        "loss": over_seeds(losses),
        "seconds": over_seeds([record["seconds"] for record in records]),
    }


def _saved(records: list[Json], fixed: list[Json]) -> Json:
    """Return the share of tokens that runs saved against those of a fixed batch."""
    pairs = [compare(one, other) for one, other in zip(records, fixed, strict=True)]
    return over_seeds([pair["tokens saved"] for pair in pairs])


def _summary(records: list[Json], fixed: list[Json]) -> Json:
    """Return what runs saved against those of the fixed batch, how they ended, and the batch of the first."""
    pairs = [compare(one, other) for one, other in zip(records, fixed, strict=True)]
    told = {name: over_seeds([pair[name] for pair in pairs]) for name in pairs[0]}
    return {**told, **_ends(records), "batch by look, first seed": records[0]["curve"]["batch"]}


def main() -> None:
    """Take the runs and write the result."""
    options = parser(__doc__, NAME, 5)
    options.add_argument("--tokens", type=int, default=FULL.tokens, help="tokens of a run")
    options.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS)
    )
    given = options.parse_args()
    setting = SMALL if given.small else replace(FULL, tokens=given.tokens, look=given.tokens // 40)
    records = given.records or given.out.with_suffix(".jsonl")
    found = measure(setting, given.seeds, records, given.optimizers)
    write(given.out, NAME, found, given.note)
    print(json.dumps(found["met"], indent=1))


if __name__ == "__main__":
    main()
