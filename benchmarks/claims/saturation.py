"""Do the weights of a small GPT come nearer to a saturated network as their norm grows?

The claim is that of Merrill et al. (EMNLP 2021, arXiv:2010.09697): the growth of the norm drives a transformer to the
network of infinitely large weights. The cosine of its outputs with those of weights times 1000 is about 0 at random
initialization, and 0.9 and more after training. What is compared was fixed when of one run the first 60 steps had been
looked at, from 0.12 at the first to 0.98 at the 21st, and nothing else:

- The runs are those of `norm_growth`, and each is carried out once for both: a GPT over bytes of 2 layers, 1200 steps
  of AdamW, the rate constant or falling as 1 / sqrt(t + 50), weight decay 0 or 0.1.
- Every 10 updates `observe saturation` compares the logits, and the outputs of the blocks (`hidden`), for the tokens of
  the training batch. `at the end` is the mean over the last tenth of the run; "about 0" is said below 0.1.
- `with the norm` is the correlation of saturation and norm over the observations of a run after its first tenth, in
  which both only leave the start.
- A control: on held-out text, the cosine of a token's logits with the saturated ones of the `same token`, and of
  `another token`, the one at the same place of another window. A direction that all tokens share, such as the
  logits of frequent bytes, gives a cosine near 1 to both, and then says little of how the network attends.

A rise is that of a run from its first observation to its end; intervals are Student's over seeds.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.claims.figures import LEVEL, beyond, correlation, over_seeds
from benchmarks.claims.growing import Setting, of_all, take_claim, tenth
from benchmarks.claims.training import Records, definition, key_of
from benchmarks.measure import Json

NAME = "saturation"
EXPECTED = "as published: about 0 at random initialization, 0.9 and more at the end, and more the larger the norm"
OUTPUTS = {"output": "logits", "hidden": "hidden"}


def with_the_norm(record: Json) -> float:
    """Return the correlation of the logits' saturation and the norm after the first tenth of the observations."""
    norm, saturation = record["norm"]["norm"], record["saturation"]["output"]
    return correlation(norm[len(norm) // 10 :], saturation[len(norm) // 10 :])


def along(record: Json, output: str) -> tuple[float, float]:
    """Return the saturation of the logits or of the blocks at the start and at the end of a run."""
    values = record["saturation"][output]
    return values[0], tenth(values, -1)


def measure(setting: Setting, count: int, records: Records) -> Json:
    """Take all runs and return what was found."""
    found = of_all(setting, count, records)
    told: dict[str, dict[str, Json]] = {}
    for output, called in OUTPUTS.items():
        told[called] = {}
        for name, runs in found.items():
            ends = [along(one, output) for one in runs]
            told[called][name] = {
                "at the start": over_seeds([start for start, _ in ends]),
                "at the end": over_seeds([end for _, end in ends]),
                "rise": over_seeds([end - start for start, end in ends]),
            }
    for name, runs in found.items():
        told["logits"][name]["with the norm"] = over_seeds([with_the_norm(one) for one in runs])
    control = {
        f"{name}, {when}": {
            what: over_seeds(
                [one["held out"][what][0] if place == 0 else tenth(one["held out"][what], -1) for one in runs]
            )
            for what in ("same token", "another token")
        }
        for name, runs in found.items()
        for place, when in ((0, "start"), (-1, "end"))
    }  # fmt: skip
    return {
        "expected": EXPECTED,
        "met": met(told["logits"]),
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "measured": {**told, "held-out text": control},
        "first seed": {
            name: {"norm": runs[0]["norm"], "saturation": runs[0]["saturation"]}
            for name, runs in found.items()
        },
    }


def met(logits: Mapping[str, Mapping[str, Json]]) -> Json:
    """Say what of the expectations the runs show, for each rate and decay."""
    said: Json = {
        "about 0 at random initialization": all(
            abs(one) < 0.1 for row in logits.values() for one in row["at the start"]["by seed"]
        )
    }
    for name, row in logits.items():
        said |= {
            f"rises, {name}": beyond(row["rise"], 1),
            f"0.9 and more at the end, {name}": min(row["at the end"]["by seed"]) >= 0.9,
            f"rises with the norm, {name}": beyond(row["with the norm"], 1),
        }
    return said


def draw(found: Json, out: Path) -> None:
    """Draw saturation over the norm, of the first seed; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (output, called) in zip(figure.subplots(1, 2), OUTPUTS.items(), strict=True):
        for name, curves in found["first seed"].items():
            axes.plot(curves["norm"]["norm"], curves["saturation"][output], label=name, linewidth=1)
        axes.set_xlabel("norm of the weights")
        axes.set_title(f"saturation, {called}", fontsize=10)
        axes.set_ylim(-0.1, 1.05)
        axes.legend(fontsize=7)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Take the runs that are not there yet, write the result and draw it."""
    take_claim(__doc__, NAME, measure, draw)


if __name__ == "__main__":
    main()
