"""Does the norm of a small GPT grow as the square root of the updates, and do the updates turn away from the weights?

The claim is that of Merrill et al. (EMNLP 2021, arXiv:2010.09697): the norm of a transformer's weights is a + b sqrt(t)
after t updates, T5's with r2 = 1.00, while the cosine of an update and the weights rises a little and then falls to
about 0. What is compared was fixed when of one run the first 60 steps had been looked at, and nothing else:

- A GPT over bytes of 2 layers is trained on the sources of Python's standard library for 1200 steps of AdamW. The rate
  is constant, or falls as 1 / sqrt(t + 50), the `1/sqrt(t) rate`; weight decay is 0 or 0.1, on matrices. Runs of one
  seed share the weights at the start and the order of the text.
- Every 10 updates `observe norm_growth` measures the weights that are neither in the embeddings nor in the head, and
  their change since it did so last. Its least squares of the norm by sqrt(t), t, log(t) and the fourth root of t are
  over the whole run. `r2` and `slope` are means over seeds; `interval in a run` is half of the 95 % interval of a slope
  that the observer gives in one run, which counts points that follow each other as fewer, and is left out where it
  counts too few in most runs.
- `alignment` is the cosine of the change and the weights before it: of its mean over the last tenth of the run "about
  0" is said below 0.1, with either sign, in every run. A small cosine may still be what the norm grows by, since there
  are many updates: `growth by alignment` is the part of the growth of the squared norm that is 2 w.d, summed over the
  changes d; the rest is the sum of d.d, the growth by steps at right angles.

AdamW's updates are as long as its rate. If they were at right angles to the weights and to each other, and without
decay, the squared norm would grow as t at a constant rate, and as log(t) at one of 1 / sqrt(t). Intervals are
Student's over seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.claims.figures import LEVEL, beyond, over_seeds
from benchmarks.claims.growing import Setting, of_all, take_claim, tenth
from benchmarks.claims.training import Records, definition, key_of
from benchmarks.measure import Json
from trainc.compiler.constructs.observe.weights._laws import LAWS, Fits

NAME = "norm_growth"
EXPECTED = (
    "as published: sqrt(t) fits best of the four laws with r2 of 0.99 and more, and the alignment"
    " falls to about 0"
)
SMALL_COSINE = 0.1
"""What "about 0" means."""


def fitted(record: Json) -> Fits:
    """Return the observer's fits of the norms of a run."""
    fits = Fits([*LAWS])
    for t, norm in zip(record["norm"]["at"], record["norm"]["norm"], strict=True):
        fits.add(t, norm)
    return fits


def laws_of(runs: Sequence[Json]) -> dict[str, dict[str, Json]]:
    """Return the r2 and slope of each law over seeds, and half of the slopes' intervals in a run."""
    every, found = [fitted(one) for one in runs], {}
    for law in LAWS:
        fits = [one.of[law] for one in every]
        found[law] = {
            "r2": over_seeds([fit.r2 or 0.0 for fit in fits]),
            "slope": over_seeds([fit.slope for fit in fits]),
        }
        halves = [(ends[1] - ends[0]) / 2 for fit in fits if (ends := fit.interval) is not None]
        if len(halves) > max(1, len(runs) / 2):
            found[law]["interval in a run"] = over_seeds(halves)
    return found


def by_alignment(record: Json) -> float:
    """Return the part of the growth of the squared norm that is by changes along the weights."""
    norm, steps = record["norm"]["norm"], record["norm"]["step"]
    part: float = 1 - sum(length**2 for length in steps) / (norm[-1] ** 2 - norm[0] ** 2)
    return part


def measure(setting: Setting, count: int, records: Records) -> Json:
    """Take all runs and return what was found."""
    found = of_all(setting, count, records)
    fits = {name: laws_of(runs) for name, runs in found.items()}
    norms = {
        name: {
            "at the start": over_seeds([one["norm"]["norm"][0] for one in runs]),
            "at the end": over_seeds([one["norm"]["norm"][-1] for one in runs]),
            "held-out loss": over_seeds([one["loss"] for one in runs]),
        }
        for name, runs in found.items()
    }
    alignments = {
        name: {
            "first tenth": over_seeds([tenth(one["norm"]["alignment"], 0) for one in runs]),
            "largest": over_seeds([max(one["norm"]["alignment"]) for one in runs]),
            "last tenth": over_seeds([tenth(one["norm"]["alignment"], -1) for one in runs]),
            "growth by alignment": over_seeds([by_alignment(one) for one in runs]),
        }
        for name, runs in found.items()
    }
    return {
        "expected": EXPECTED,
        "met": met(fits, alignments),
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "fits": fits,
        "measured": {"norm": norms, "alignment": alignments},
        "first seed": {name: runs[0]["norm"] for name, runs in found.items()},
        "seconds": {n: over_seeds([one["seconds"] for one in runs]) for n, runs in found.items()},
    }


def met(fits: Mapping[str, Mapping[str, Json]], alignments: Mapping[str, Json]) -> Json:
    """Say what of the expectations the runs show, for each rate and decay."""
    said: Json = {}
    for name, laws in fits.items():
        r2 = {law: one["r2"]["by seed"] for law, one in laws.items()}
        others = zip(*(values for law, values in r2.items() if law != "sqrt"), strict=True)
        ahead = [a - max(b) for a, b in zip(r2["sqrt"], others, strict=True)]
        first, last = (alignments[name][part]["by seed"] for part in ("first tenth", "last tenth"))
        falls = over_seeds([a - b for a, b in zip(first, last, strict=True)])
        said |= {
            f"sqrt fits best, {name}": beyond(over_seeds(ahead), 1),
            f"sqrt with r2 >= 0.99, {name}": min(r2["sqrt"]) >= 0.99,
            f"alignment falls, {name}": beyond(falls, 1),
            f"alignment about 0 at the end, {name}": max(map(abs, last)) < SMALL_COSINE,
        }
    return said


def draw(found: Json, out: Path) -> None:
    """Draw the norms over sqrt(t), and alignments over t, of the first seed; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in found["first seed"].items():
        r2 = fmean(found["fits"][name]["sqrt"]["r2"]["by seed"])
        left.plot(
            [t**0.5 for t in curve["at"]], curve["norm"], label=f"{name}: r2 {r2:.4f}", linewidth=1
        )
        right.plot(curve["at"][1:], curve["alignment"], label=name, linewidth=1)
    left.set_xlabel("square root of the updates")
    left.set_ylabel("norm of the weights")
    left.legend(fontsize=7)
    right.axhline(0, color="gray", linewidth=0.8)
    right.set_xlabel("updates")
    right.set_ylabel("cosine of change and weights")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Take the runs, write the result and draw it."""
    take_claim(__doc__, NAME, measure, draw)


if __name__ == "__main__":
    main()
