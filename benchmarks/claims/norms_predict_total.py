"""Does the noise scale of the normalization layers tell that of the whole model?

The claim is Gray et al.'s (NeurIPS 2024, arXiv:2411.00999): over a training run the noise scale of the
norms' weights is nearly proportional to that of all weights, as a function of how both are smoothed.
What is computed was fixed before any run was looked at:

- A small GPT trains on the standard library's text with AdamW, once with LayerNorm and once with
  RMSNorm, from several seeds. Both noise scales are trainc's own, read after every step; |G|^2 and
  tr(Sigma) are averaged separately from zero with weight 1 - alpha (the debiasing cancels in the ratio).
- Over the steps after the first tenth at which both are determined: Pearson's correlation, and the
  least-squares slope through the origin of total against norms.
- Two series that only grow together are correlated too. `without trend` is the correlation of what is
  left of the logarithms when a line in the logarithm of the step is taken out of each.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from benchmarks.claims.figures import LEVEL, correlation, over_seeds, slope_through_origin
from benchmarks.claims.training import (
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
from examples.models import Norm
from trainc.compiler.program.program import Program

NAME = "norms_predict_total"
GOAL = 0.95
EXPECTED = "a mean correlation of at least 0.95 at alpha = 0.99, for LayerNorm and RMSNorm"
ALPHAS = (0.9, 0.95, 0.99)
DRAWN = 0.95
NORMS: dict[str, Norm] = {"LayerNorm": "layer", "RMSNorm": "rms"}
SPEC = """train 1
data "examples.data:stdlib" { batch = %(batch)d samples, context = %(context)d }
loss cross_entropy
run { length = %(steps)d steps, seed = %(seed)d }
optimizer adamw {
    lr = 2e-3 * (warmup(5%%) then cosine(to = 10%%)),
    betas = [0.9, 0.95], weight_decay = 0.1 on ndim(2), clip = 1.0,
}
%(measures)s
"""
MEASURE = """noise_scale gns as norms_%(label)s on role(norm) { smooth = %(half)r steps }
noise_scale gns as total_%(label)s on all { smooth = %(half)r steps }
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; `batch` in samples."""

    model: Model
    batch: int
    steps: int
    seed: int

    @property
    def spec(self) -> str:
        """Return the text of the run's spec: two clauses for each alpha, which share their measurement."""
        measures = [
            MEASURE % {"label": _label(alpha), "half": math.log(0.5) / math.log(alpha)}
            for alpha in ALPHAS
        ]
        return SPEC % {
            "batch": self.batch,
            "context": self.model.context,
            "steps": self.steps,
            "seed": self.seed,
            "measures": "".join(measures),
        }


FULL = Run(Model(3, 64, 64), batch=24, steps=400, seed=0)
SMALL = Run(Model(1, 16, 16), batch=8, steps=30, seed=0)


def _label(alpha: float) -> str:
    return f"{alpha:g}".replace(".", "_")


def carry_out(run: Run, data: Data) -> Json:
    """Train one run and return what the two noise scales had to do with each other."""
    series: dict[float, list[tuple[float, float]]] = {alpha: [] for alpha in ALPHAS}
    losses: list[float] = []

    def look(_program: Program, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        for alpha in ALPHAS:
            label = _label(alpha)
            series[alpha].append((metrics[f"norms_{label}"], metrics[f"total_{label}"]))

    spent = train(run.spec, run.model, data, run.seed, look)
    some = range(run.steps // 40 - 1, run.steps, max(1, run.steps // 40))
    drawn = series[DRAWN]
    return {
        "seconds": round(spent, 1),
        "loss": [round(losses[0], 4), round(sum(losses[-20:]) / len(losses[-20:]), 4)],
        "relation": {str(alpha): relation(series[alpha]) for alpha in ALPHAS},
        "curve": {
            "step": [i + 1 for i in some],
            "norms": [_finite(drawn[i][0]) for i in some],
            "total": [_finite(drawn[i][1]) for i in some],
        },
    }


def relation(series: Sequence[tuple[float, float]]) -> Json:
    """Return correlation and slope of total against norms over steps (norms, total), and how many there were."""
    begin = len(series) // 10
    points = [
        (i + 1, x, y)
        for i, (x, y) in enumerate(series)
        if i >= begin and math.isfinite(x) and math.isfinite(y)
    ]
    if len(points) < 3:
        return {"points": len(points), "correlation": None, "slope": None, "without trend": None}
    steps, x, y = (list(column) for column in zip(*points, strict=True))
    trend = [math.log(step) for step in steps]
    return {
        "points": len(points),
        "undetermined": len(series) - begin - len(points),
        "correlation": round(correlation(x, y), 4),
        "slope": round(slope_through_origin(x, y), 4),
        "without trend": round(correlation(_without(trend, x), _without(trend, y)), 4),
    }


def _without(trend: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return the logarithms of `values` without their least-squares line in `trend`."""
    logs = [math.log(value) for value in values]
    middle, level = sum(trend) / len(trend), sum(logs) / len(logs)
    slope = sum((t - middle) * (v - level) for t, v in zip(trend, logs, strict=True))
    slope /= sum((t - middle) ** 2 for t in trend)
    return [v - level - slope * (t - middle) for t, v in zip(trend, logs, strict=True)]


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def measure(size: Run, count: int, records: Path) -> tuple[Json, dict[str, list[Json]]]:
    """Take all runs; return what was found and the runs by kind of norm."""
    torch.set_num_threads(1)
    done, data = Records(records), text(size.model.context)
    runs: dict[str, list[Json]] = {name: [] for name in NORMS}
    for seed in seeds(count):
        for name, norm in NORMS.items():
            run = replace(size, model=replace(size.model, norm=norm), seed=seed)
            record = done.get(key_of(run), partial(carry_out, run, data))
            runs[name].append(record)
            told = {
                alpha: (r["correlation"], r["slope"]) for alpha, r in record["relation"].items()
            }
            print(
                f"{name}, seed {seed}, {record['seconds']} s: correlation, slope {told}", flush=True
            )
    measured = {
        name: {str(alpha): _summary(own, str(alpha)) for alpha in ALPHAS}
        for name, own in runs.items()
    }
    found = {
        "expected": EXPECTED,
        "met": {name: _met(one) for name, one in measured.items()},
        "level of the intervals": LEVEL,
        "setting": key_of(size),
        "definition": definition(__doc__),
        "measured": measured,
    }
    return found, runs


def _met(found: Json) -> bool:
    told = found[str(ALPHAS[-1])]["correlation"]
    return told is not None and told["mean"] >= GOAL


def _summary(runs: Sequence[Json], alpha: str) -> Json:
    """Return each figure over seeds; None where a seed has too few points for it."""
    relations = [run["relation"][alpha] for run in runs]
    told: Json = {"points": [one["points"] for one in relations]}
    for name in ("correlation", "slope", "without trend"):
        values = [one[name] for one in relations]
        told[name] = None if None in values else over_seeds(cast(list[float], values))
    return told


def draw(runs: dict[str, list[Json]], out: Path) -> None:
    """Draw total against norms and both over the steps, one row for each kind of norm; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 2, squeeze=False)
    for (name, own), (left, right) in zip(runs.items(), axes, strict=True):
        for seed, run in zip(seeds(len(own)), own, strict=True):
            pairs = zip(run["curve"]["norms"], run["curve"]["total"], strict=True)
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            left.plot([x for x, _ in known], [y for _, y in known], ".", ms=4, label=f"seed {seed}")
            for key, style in (("norms", ":"), ("total", "-")):
                values = [math.nan if v is None else v for v in run["curve"][key]]
                right.plot(run["curve"]["step"], values, style, color=f"C{seed - 1}", lw=1)
        slopes = [s for run in own if (s := run["relation"][str(DRAWN)]["slope"]) is not None]
        if slopes:
            slope = sum(slopes) / len(slopes)
            left.axline((0, 0), slope=slope, color="black", lw=1, label=f"slope {slope:.2f}")
        left.set(xlabel=f"noise scale of {name}", ylabel="noise scale of all layers", title=name)
        right.set(xlabel="step", yscale="log", title=f"all layers (line), {name} (dots)")
        left.legend(fontsize=7)
    figure.suptitle(f"noise scales in samples, alpha = {DRAWN}")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Take the runs, write the result and draw it."""
    options = parser(__doc__, NAME, 5)
    options.add_argument("--steps", type=int, default=FULL.steps, help="steps of a run")
    given = options.parse_args()
    size = SMALL if given.small else replace(FULL, steps=given.steps)
    found, runs = measure(size, given.seeds, given.records or given.out.with_suffix(".jsonl"))
    write(given.out, NAME, found, given.note)
    draw(runs, given.out.with_suffix(".png"))
    print(json.dumps(found["met"], indent=1))


if __name__ == "__main__":
    main()
