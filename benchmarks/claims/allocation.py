"""Do the tails of spectra say which blocks of a small GPT can be pruned more?

The claims are those of AlphaPruning (Lu et al., NeurIPS 2024, arXiv:2410.10912) and FARMS (Hu et al., ICML 2025,
arXiv:2506.06280): at equal total sparsity, blocks whose weights have heavier tails, a smaller alpha, should be pruned
less, and alphas of windows of one aspect say so better. What is compared was fixed before any run was looked at:

- A GPT over bytes is trained on the sources of Python's standard library, a model for each seed. The linear layers of
  its blocks are pruned at once, without training afterwards: by magnitude in each weight, or by Wanda with the inputs
  of 32 training windows. All weights of a block have the density of the block, by `trainc.functional.allocate`.
- `uniform` gives all blocks one density. `alpha` is as published: mean alpha of a block's weights, tail from the peak
  of the spectrum. `median` has the tail from the median. `farms` takes windows of 32 rows and aspect 1. `calibrated`
  is the median's alpha beside that of random weights of the shape. Controls: `permuted` has the densities of `alpha`
  in another order, `reversed` in the opposite order of alphas.
- The spread is 0.2. A model is judged by its perplexity on held-out windows; what is reported is the mean over seeds
  of the difference of log perplexities to `uniform`, with its interval: below 0 is better.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.claims.figures import LEVEL, beyond, over_seeds
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
from trainc.functional import (
    allocate,
    calibrated_alpha,
    farms_alpha,
    hill_alpha,
    topk_mask,
    wanda_mask,
)

NAME = "allocation"
EXPECTED = (
    "`alpha` below uniform at 70% and 80%, `farms` below `alpha`, and the controls above uniform"
)
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
SPREAD = 0.2
WINDOW = 32
ALLOCATIONS = ("uniform", "alpha", "median", "farms", "calibrated", "permuted", "reversed")
PRUNERS = ("magnitude", "wanda")
SPEC = """train 1
loss cross_entropy
optimizer adamw { lr = 3e-3 * (warmup(5%%) then cosine()), weight_decay = 0.1 on ndim(2), clip = 1 }
run { length = %(steps)d steps, seed = %(seed)d }
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """The model, its training and what it is judged on."""

    layers: int
    width: int
    context: int
    batch: int
    steps: int
    windows: int


FULL = Setting(layers=6, width=64, context=64, batch=16, steps=600, windows=64)
SMALL = Setting(layers=2, width=32, context=16, batch=4, steps=4, windows=4)


def alphas_of(weight: Tensor) -> dict[str, float]:
    """Return the alphas of a weight by each definition."""
    median = hill_alpha(weight)
    return {
        "alpha": hill_alpha(weight, "peak"),
        "median": median,
        "farms": farms_alpha(weight, min(WINDOW, *weight.shape)),
        "calibrated": calibrated_alpha(median, tuple(weight.shape)),
    }


def block_alphas(blocks: list[list[Tensor]]) -> dict[str, list[float]]:
    """Return the mean alpha of each block's weights, by definition."""
    found = [[alphas_of(weight) for weight in block] for block in blocks]
    return {name: [fmean(one[name] for one in block) for block in found] for name in found[0][0]}


def densities(
    name: str, alphas: Mapping[str, list[float]], sizes: list[int], density: float, seed: int
) -> list[float]:
    """Return the density of each block."""
    if name == "uniform":
        return [density] * len(sizes)
    of = alphas.get(name, alphas["alpha"])
    if name == "permuted":
        of = random.Random(seed).sample(of, len(of))
    if name == "reversed":
        of = [-alpha for alpha in of]
    return allocate(of, sizes, density, SPREAD)


def linears(model: nn.Module) -> list[list[nn.Linear]]:
    """Return the linear layers of each block."""
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    return [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]


def input_norms(program: Program, layers: list[nn.Linear], batch: Tensor) -> dict[int, Tensor]:
    """Return the L2 norms of what each layer is given, by its `id`."""
    found: dict[int, Tensor] = {}

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[id(module)] = given[0].detach().flatten(0, -2).square().sum(0).sqrt()

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        program.module.eval()(batch)
    for hook in hooks:
        hook.remove()
    return found


def carry_out(setting: Setting, seed: int, data: Data) -> Json:
    """Train a model, prune it in each way, and return perplexities."""
    held_out = HeldOut(data, setting.windows)
    model = Model(setting.layers, setting.width, setting.context)
    programs: list[Program] = []
    spec = SPEC % {"steps": setting.steps, "seed": seed}
    source = f'data "examples.data:stdlib" {{ batch = {setting.batch} samples, context = {setting.context} }}\n'
    train(
        spec.replace("loss", source + "loss", 1), model, data, seed, lambda p, _: programs.append(p)
    )
    program = programs[-1]
    layers = linears(program.module)
    flat = [layer for block in layers for layer in block]
    norms = input_norms(program, flat, data.train.batch(range(32))[0])
    start = {id(layer): layer.weight.detach().clone() for layer in flat}
    alphas = block_alphas([[layer.weight.detach() for layer in block] for block in layers])
    sizes = [sum(layer.weight.numel() for layer in block) for block in layers]
    found: Json = {"dense": exp(held_out(program)), "alphas": alphas}
    for pruner in PRUNERS:
        for sparsity in SPARSITIES:
            for name in ALLOCATIONS:
                given = densities(name, alphas, sizes, 1 - sparsity, seed)
                for block, density in zip(layers, given, strict=True):
                    for layer in block:
                        weight, one = start[id(layer)], max(density, 1 / layer.weight.numel())
                        kept = (
                            topk_mask(weight.abs(), density=one)
                            if pruner == "magnitude"
                            else wanda_mask(weight, norms[id(layer)], one)
                        )
                        layer.weight.data.copy_(weight * kept)
                found[f"{pruner} {sparsity:.0%} {name}"] = exp(held_out(program))
    return found


def measure(setting: Setting, count: int, records: Records) -> Json:
    """Take all runs and return what was found."""
    torch.set_num_threads(1)
    data = text(setting.context)
    runs = []
    for seed in seeds(count):
        record = records.get(key_of(setting, seed=seed), partial(carry_out, setting, seed, data))
        print(f"seed {seed}: dense {record['dense']:.3f}", flush=True)
        runs.append(record)
    places = [f"{pruner} {sparsity:.0%}" for pruner in PRUNERS for sparsity in SPARSITIES]
    gaps = {
        place: {
            name: over_seeds([_log(run, place, name) - _log(run, place, "uniform") for run in runs])
            for name in ALLOCATIONS[1:]
        }
        for place in places
    }
    farms = {
        place: over_seeds([_log(run, place, "farms") - _log(run, place, "alpha") for run in runs])
        for place in places
    }
    high = [place for place in places if place.endswith(("70%", "80%"))]
    return {
        "expected": EXPECTED,
        "met": {
            f"`alpha` below uniform, {place}": beyond(gaps[place]["alpha"], -1) for place in high
        }
        | {f"`farms` below `alpha`, {place}": beyond(farms[place], -1) for place in high}
        | {
            f"permuted above uniform, {place}": beyond(gaps[place]["permuted"], 1) for place in high
        },
        "level of the intervals": LEVEL,
        "setting": key_of(setting),
        "definition": definition(__doc__),
        "perplexity of the dense models": over_seeds([run["dense"] for run in runs]),
        "perplexity": {
            place: {
                name: over_seeds([run[f"{place} {name}"] for run in runs]) for name in ALLOCATIONS
            }
            for place in places
        },
        "differences of the log perplexity to uniform": gaps,
        "differences of the log perplexity of farms to alpha": farms,
    }


def _log(run: Json, place: str, name: str) -> float:
    return float(torch.tensor(run[f"{place} {name}"], dtype=torch.float64).log())


def draw(found: Json, out: Path) -> None:
    """Draw the differences by sparsity with their intervals; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    gaps = found["differences of the log perplexity to uniform"]
    for axes, pruner in zip(figure.subplots(1, 2), PRUNERS, strict=True):
        for place, name in enumerate(ALLOCATIONS[1:]):
            rows = [gaps[f"{pruner} {sparsity:.0%}"][name] for sparsity in SPARSITIES]
            at = [100 * sparsity + 0.4 * (place - 2.5) for sparsity in SPARSITIES]
            ends = [row["interval"] or (row["mean"], row["mean"]) for row in rows]
            lines = axes.plot(at, [row["mean"] for row in rows], "o", label=name)
            for x, (low, high) in zip(at, ends, strict=True):
                axes.plot([x, x], [low, high], color=lines[0].get_color())
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set_xticks([100 * sparsity for sparsity in SPARSITIES])
        axes.set_xlabel(f"sparsity in %, {pruner}")
        axes.set_ylabel("log perplexity minus uniform")
        axes.legend(fontsize=7)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Take the runs, write the result and draw it."""
    given = parser(__doc__, NAME, 5).parse_args()
    records = Records(given.records or given.out.with_suffix(".jsonl"))
    found = measure(SMALL if given.small else FULL, given.seeds, records)
    write(given.out, NAME, found, given.note)
    draw(found, given.out.with_suffix(".png"))
    print(json.dumps(found["met"], indent=1))


if __name__ == "__main__":
    main()
