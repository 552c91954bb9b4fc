"""A small vision transformer that has learnt five classes of digits and learns the other five from few images."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from benchmarks.claims.figures import over_seeds
from benchmarks.claims.training import Records, key_of, steps
from benchmarks.measure import Json
from examples.data import Data, some_digits
from examples.models import vit

SPEC = """train 1
data "examples.data:some_digits" { batch = %(batch)d samples, first = %(first)d, images = %(images)d, seed = %(seed)d }
loss cross_entropy
run { length = %(steps)d steps, seed = %(seed)d }
optimizer adamw { lr = %(rate)g * (warmup(10%%) then cosine(to = 0)), weight_decay = %(decay)g on ndim(2) }
%(more)s
"""
LORA = 'adapt lora on "blocks.**" & type(Linear) { rank = %d, alpha = %d, train = role(head) }\n'
LAYERS = '"blocks.*.*.*" & type(Linear)'
"""The layers with adapters."""
MATRICES = '"blocks.*.*.*.weight" & ndim(2)'
KNOWN, NEW = 0, 5
"""The first of the five classes that are learnt before, and of those that are learnt then."""
TUNING = (101, 102, 103)
"""Seeds on which rates and strengths are chosen, and which are not compared."""
IMAGES = 20
"""Held-out images at which the gradients of the outputs are taken."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Blocks and width of the model, steps before, and then images a class, images a step, steps; rank 0 trains all."""

    layers: int = 2
    width: int = 48
    before: int = 500
    images: int = 8
    batch: int = 20
    steps: int = 120
    rank: int = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One adaptation: `clauses` are those of the method, `dropout` that of the model."""

    setting: Setting
    rate: float
    clauses: str
    seed: int
    dropout: float = 0.0

    @property
    def spec(self) -> str:
        """Return the text of the run's spec."""
        setting = self.setting
        adapter = LORA % (setting.rank, 2 * setting.rank) if setting.rank else ""
        return SPEC % {
            "batch": setting.batch, "first": NEW, "images": setting.images, "seed": self.seed,
            "steps": setting.steps, "rate": self.rate, "decay": 1e-4, "more": adapter + self.clauses,
        }  # fmt: skip

    def model(self) -> nn.Module:
        """Return the pre-trained model with a new head."""
        setting = self.setting
        torch.manual_seed(self.seed)
        model = _vit(setting, self.dropout)
        known = pretrained(setting.layers, setting.width, setting.before, self.seed)
        model.load_state_dict({**model.state_dict(), **known})
        return model


SMALL = Setting(layers=1, width=16, before=8, images=4, batch=10, steps=4, rank=2)


def _vit(setting: Setting, dropout: float) -> nn.Module:
    return vit(layers=setting.layers, width=setting.width, classes=5, dropout=dropout)


@cache
def pretrained(layers: int, width: int, length: int, seed: int) -> Mapping[str, Tensor]:
    """Train on the known classes and return the weights of all but the head, by name."""
    torch.manual_seed(seed)
    model = vit(layers=layers, width=width, classes=5)
    values = {"batch": 32, "first": KNOWN, "images": 0, "seed": seed, "steps": length}
    program = trainc.compile(
        SPEC % {**values, "rate": 3e-3, "decay": 0.05, "more": ""}, model, executor="module"
    )
    for _ in steps(program, some_digits(KNOWN, 0, seed), seed):
        pass
    state = model.state_dict()
    return {name: one.detach().clone() for name, one in state.items() if "head." not in name}


def carry_out(run: Run) -> Json:
    """Train one run and return its accuracy in percent, losses, gradient norms and distances from the start."""
    data, model = some_digits(NEW, run.setting.images, run.seed), run.model()
    start = {name: one.detach().clone() for name, one in model.state_dict().items()}
    program = trainc.compile(run.spec, model, executor="module")
    begin = time.process_time()
    for _ in steps(program, data, run.seed):
        pass
    spent = time.process_time() - begin
    with program.evaluation_weights():
        return {"seconds": round(spent, 2), **measured(_plain(run, program), start, data)}


def _plain(run: Run, program: trainc.Program) -> nn.Module:
    """Return a model of its own with the weights of a program, its adapters added to them."""
    weights = {name: one.detach().clone() for name, one in program.module.state_dict().items()}
    scale = 2.0  # alpha / rank
    for name in [name for name in weights if name.endswith(".lora.b.weight")]:
        layer = name.removesuffix(".lora.b.weight")
        a, b = weights.pop(f"{layer}.lora.a.weight"), weights.pop(name)
        weights[f"{layer}.weight"] += scale * b @ a
    model = _vit(run.setting, 0.0).eval()
    model.load_state_dict(weights)
    return model


def measured(model: nn.Module, start: Mapping[str, Tensor], data: Data) -> Json:
    """Return what a trained model does with its images and with others, and how far it is from its start.

    `gradient` is the L2 norm of the gradient of the loss on what was trained, over all weights; `gradient of outputs`
    the root of the mean over images of the sum over outputs of the squared norms of theirs; `distance` the mean over
    held-out images of the squared distance of the logits from those of the pre-trained weights under the same head;
    `distance of weights` the L2 norm of their change, without the head's.
    """
    (x, y), (others, classes) = (
        part.batch(range(len(part))) for part in (data.train, data.evaluation)
    )
    parameters = [*model.parameters()]
    loss = cross_entropy(model(x), y)
    gradient = _norm(torch.autograd.grad(loss, parameters))
    squares = 0.0
    for image in others[:IMAGES]:
        logits = model(image[None]).flatten()
        for k, logit in enumerate(logits):
            found = torch.autograd.grad(logit, parameters, retain_graph=k + 1 < len(logits))
            squares += _norm(found) ** 2 / IMAGES
    with torch.no_grad():
        logits = model(others)
        own = model.state_dict()
        head = {name: one for name, one in own.items() if "head." in name}
        first = torch.func.functional_call(model, {**start, **head}, (others,))
        apart = [one - start[name] for name, one in own.items() if name not in head]
        told = {
            "accuracy": 100 * float((logits.argmax(1) == classes).float().mean()),
            "held-out loss": float(cross_entropy(logits, classes)),
            "trained loss": float(loss),
            "gradient": gradient,
            "gradient of outputs": math.sqrt(squares),
            "distance": float((logits - first).square().sum(1).mean()),
            "distance of weights": _norm(apart),
        }
    return {name: float(f"{value:.6g}") for name, value in told.items()}


def _norm(tensors: "list[Tensor] | tuple[Tensor, ...]") -> float:
    return math.sqrt(sum(float(one.square().sum()) for one in tensors))


class Trials:
    """Takes runs, from the records where they are there, and says how each ended."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def __call__(self, run: Run) -> Json:
        """Return the record of a run."""
        record = self.records.get(key_of(run), partial(carry_out, run))
        method = run.clauses or "plain"
        print(
            f"{record['accuracy']:.2f}% by {method}, rate {run.rate:g}, seed {run.seed}", flush=True
        )
        return record

    def mean(self, run: Run, seeds: Iterable[int]) -> float:
        """Return the mean accuracy of a run over seeds."""
        return fmean(self(replace(run, seed=seed))["accuracy"] for seed in seeds)

    def difference(self, run: Run, plain: Run, seeds: Iterable[int], figure: str) -> Json:
        """Return how much larger a figure is than in another run of the same seed, over seeds."""
        pairs = [(self(replace(run, seed=s)), self(replace(plain, seed=s))) for s in seeds]
        return over_seeds([one[figure] - other[figure] for one, other in pairs])

    def choose(self, runs: Sequence[Run]) -> tuple[Run, list[Json]]:
        """Return the most accurate of some runs on `TUNING`, and what each had."""
        means = [self.mean(run, TUNING) for run in runs]
        best = max(range(len(runs)), key=means.__getitem__)
        tried = [
            {"clauses": run.clauses, "rate": run.rate, "dropout": run.dropout, "accuracy": round(mean, 3)}
            for run, mean in zip(runs, means, strict=True)
        ]  # fmt: skip
        return runs[best], tried
