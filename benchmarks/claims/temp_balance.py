"""Does it matter what the measured rates follow? TempBalance and layer-wise rates beside controls.

What is compared was fixed before any run was looked at. The claims are those of Zhou et al. (NeurIPS 2023,
arXiv:2312.00359), that rates by the tails of spectra help where data is scarce, and of He et al. (ICML 2026,
arXiv:2605.22297), that they help pre-training.

- digits: 100 of scikit-learn's images, an MLP of six layers of which the four inner ones have measured rates, SGD with
  a cosine, and the accuracy on 797 other images after 40 epochs. Runs of one seed share images, order and weights.
  `default` is `lr temp_balance` as it is without fields, `published` is without the null and with the full gain, and
  `permuted`, `reversed` and `static` are its controls: another layer's alpha, alpha mirrored, the first factors kept.
  If `permuted` does as well, the gain is not by the measurement.
- text: a GPT of 2 layers over the standard library's text for 300 steps of AdamW. `recipe` is the published one: a
  linear map onto 1..5, embeddings and head at the top, for a fifth of the run. `embeddings` is static: it multiplies
  the rates of embeddings and head by 5 and measures nothing; `permuted` is the recipe with other layers' alphas. Each
  is at the better of two rates.

A difference is that of a run to the one of its seed that it is compared with; intervals are Student's over seeds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import pstdev

import torch
from torch import Tensor, nn

import trainc
from benchmarks.claims.figures import LEVEL, beyond, draw_rows, over_seeds, to_others
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
from trainc.functional import hill_alpha

NAME = "temp_balance"
EXPECTED = "on digits, measured rates above uniform ones and above permuted ones, each by more than its interval"
LR = 'lr temp_balance on "inner.*" & ndim(2) every %(every)d steps { %(fields)s }'
PUBLISHED = "metric = alpha, shrink = false"
DIGITS = {
    "uniform": None,
    "published": PUBLISHED,
    "default": "",
    "permuted": f"{PUBLISHED}, control = permuted",
    "reversed": f"{PUBLISHED}, control = reversed",
    "static": f"{PUBLISHED}, control = static",
}
SPEC = """train 1
loss cross_entropy
run { length = %(steps)d steps, seed = %(seed)d }
optimizer sgd { lr = %(rate)r * cosine(), momentum = 0.9, weight_decay = 5e-4 }
%(policy)s
"""
ENDS = "type(Embedding) | role(head)"
RECIPE = (
    "lr temp_balance on matrices | type(Embedding) until 20%%%% every %%(every)d steps { metric = alpha,"
    " shrink = false, range = 1..5, highest = %s, ramp = %%(ramp)d steps%s }"
)
TEXT = {
    "uniform": "",
    "recipe": RECIPE % (ENDS, ""),
    "embeddings": "lr by_type { factors = [5 on type(Embedding), 5 on role(head)] }",
    "permuted": RECIPE % (ENDS, ", control = permuted"),
}
TEXT_SPEC = """train 1
data "examples.data:stdlib" { batch = %(batch)d samples, context = %(context)d }
loss cross_entropy
run { length = %(steps)d steps, seed = %(seed)d }
optimizer adamw { lr = %(rate)r, betas = [0.9, 0.95], weight_decay = 0.1 on ndim(2), clip = 1.0 }
%(policy)s
"""
RATES = (1e-3, 3e-3)


@dataclass(frozen=True, slots=True)
class DigitsRun:
    """One run on a few images."""

    method: str
    seed: int
    images: int = 100
    width: int = 96
    epochs: int = 40
    batch: int = 25
    rate: float = 0.03


@dataclass(frozen=True, slots=True)
class TextRun:
    """One run on text."""

    method: str
    seed: int
    rate: float
    model: Model
    batch: int = 12
    steps: int = 300
    windows: int = 96


class Net(nn.Module):
    """Layers of one width between the first and the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        inner = [nn.Linear(width, width) for _ in range(4)]
        self.inner = nn.ModuleList(inner)
        self.last = nn.Linear(width, 10)
        for layer in (self.first, *self.inner, self.last):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (examples, 10) of images (examples, 64)."""
        for layer in (self.first, *self.inner):
            x = torch.relu(layer(x))
        logits: Tensor = self.last(x)
        return logits


def on_digits(run: DigitsRun) -> Json:
    """Train one run and return its accuracy and the spread of alpha over the inner layers at its end."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels, dtype=torch.float32)
    y = torch.as_tensor(classes, dtype=torch.long)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    pool, held_out = order[:1000], order[1000:]
    source = torch.Generator().manual_seed(run.seed)
    own = pool[torch.randperm(len(pool), generator=source)[: run.images]]
    x = (x - x[own].mean()) / x[own].std()
    each = run.images // run.batch
    fields = DIGITS[run.method]
    values = {"steps": run.epochs * each, "seed": run.seed, "rate": run.rate}
    policy = "" if fields is None else LR % {"every": each, "fields": fields}
    torch.manual_seed(run.seed)
    net = Net(run.width)
    program = trainc.compile(SPEC % {**values, "policy": policy}, net)
    for _ in range(run.epochs):
        shuffled = own[torch.randperm(run.images, generator=source)]
        for part in shuffled.split(run.batch)[:each]:
            program.step((x[part], y[part]))
    with torch.no_grad():
        correct = net.eval()(x[held_out]).argmax(1) == y[held_out]
    alphas = [
        hill_alpha(p)
        for name, p in net.named_parameters()
        if name.startswith("inner.") and p.dim() == 2
    ]
    return {"accuracy": 100 * float(correct.float().mean()), "spread": pstdev(alphas)}


def on_text(run: TextRun) -> Json:
    """Train one run and return its loss on held-out windows."""
    data = text(run.model.context)
    values = {
        "batch": run.batch, "context": run.model.context, "steps": run.steps, "seed": run.seed,
        "rate": run.rate, "policy": TEXT[run.method] % {"every": run.steps // 10, "ramp": max(1, run.steps // 20)},
    }  # fmt: skip
    held_out, found = HeldOut(data, run.windows), [0.0]

    def look(program: trainc.Program, metrics: Mapping[str, float]) -> None:
        if program.clock.steps == run.steps:
            found[0] = held_out(program)

    train(TEXT_SPEC % values, run.model, data, run.seed, look)
    return {"loss": found[0]}


def measure(digits: DigitsRun, words: TextRun, count: int, few: int, records: Path) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    kept = Records(records)

    def take(run: DigitsRun | TextRun, work: Callable[[], Json]) -> Json:
        record = kept.get(key_of(run), work)
        print({"run": key_of(run), **{k: v for k, v in record.items() if k != "run"}}, flush=True)
        return record

    on: dict[str, list[Json]] = {name: [] for name in DIGITS}
    for seed in seeds(count):
        for name in DIGITS:
            run = replace(digits, method=name, seed=seed)
            on[name].append(take(run, partial(on_digits, run)))
    losses: dict[str, dict[float, list[float]]] = {n: {r: [] for r in RATES} for n in TEXT}
    for seed in seeds(few):
        for name in TEXT:
            for rate in RATES:
                one = replace(words, method=name, seed=seed, rate=rate)
                losses[name][rate].append(take(one, partial(on_text, one))["loss"])
    best = {name: min((sum(by[rate]), rate) for rate in by)[1] for name, by in losses.items()}
    accuracy = {name: [r["accuracy"] for r in runs] for name, runs in on.items()}
    told = to_others(accuracy, ("uniform", "permuted"))
    return {
        "expected": EXPECTED,
        "met": {
            f"{name} above {other}": beyond(told[name][f"to {other}"], 1)
            for name in ("published", "default")
            for other in ("uniform", "permuted")
        },
        "level of the intervals": LEVEL,
        "definition": definition(__doc__),
        "measured": {
            "digits": {
                "accuracy, %": told,
                "spread of alpha": {
                    n: over_seeds([r["spread"] for r in runs]) for n, runs in on.items()
                },
            },
            "text": {
                "rate": best,
                "loss": to_others(
                    {name: losses[name][rate] for name, rate in best.items()},
                    ("uniform", "embeddings"),
                ),
            },
        },
    }


def table(found: Json) -> str:
    """Return what was found as text, a row for each method."""
    lines = []
    for title, told in (
        ("digits, accuracy in %", found["digits"]["accuracy, %"]),
        ("text, loss at the better rate", found["text"]["loss"]),
    ):
        lines.append(title)
        for name, row in told.items():
            cells = [f"{label} {one['mean']:.3f} {one['interval']}" for label, one in row.items()]
            lines.append(f"  {name:12} {'; '.join(cells)}")
    return "\n".join(lines)


def draw(found: Json, out: Path) -> None:
    """Draw the differences from uniform rates with their intervals; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = (
        ("accuracy on digits to uniform, points", found["digits"]["accuracy, %"]),
        ("loss on text to uniform, nats", found["text"]["loss"]),
    )
    for axes, (title, told) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = {name: row["to uniform"] for name, row in told.items() if name != "uniform"}
        draw_rows(axes, rows)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(title, fontsize=10)
    figure.savefig(out, dpi=120)


def main() -> None:
    """Take the runs, write the result and draw it."""
    options = parser(__doc__, NAME, 24)
    options.add_argument("--text-seeds", type=int, default=3, help="seeds on text (3)")
    given = options.parse_args()
    digits, words = DigitsRun("uniform", 1), TextRun("uniform", 1, RATES[0], Model(2, 64, 48))
    if given.small:
        digits = replace(digits, epochs=2, width=64)
        words = replace(words, model=Model(1, 64, 8), batch=2, steps=20, windows=4)
    records = given.records or given.out.with_suffix(".jsonl")
    found = measure(digits, words, given.seeds, given.text_seeds, records)
    write(given.out, NAME, found, given.note)
    draw(found["measured"], given.out.with_suffix(".png"))
    print(table(found["measured"]))
    print(json.dumps(found["met"], indent=1))


if __name__ == "__main__":
    main()
