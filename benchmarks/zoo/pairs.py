"""Every two constructs in one spec: they train as they should, or are refused with a reason.

A pair is put on the first model on which each of the two trains alone. There it trains three steps by the modules and
by the graph, with equal numbers, and goes on from a saved state bit for bit.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import trainc
from benchmarks.zoo import own_models
from benchmarks.zoo.architecture import Architecture, numbers, tokens
from benchmarks.zoo.checks import Trained, Wrong, check_equal, check_finite
from benchmarks.zoo.clauses import BATCH, clauses
from benchmarks.zoo.examine import Outcome, attempt, located, logits_shape
from examples.models import LanguageModel, gpt
from trainc.compiler.catalog import catalog
from trainc.compiler.driver.compile import resolve_spec
from trainc.compiler.errors import GraphRefused
from trainc.compiler.execution.execution import Executor
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct

STEPS, SAVED = 3, 2
"""The steps that a pair trains, and those before its state is saved."""
APART = ("model", "data", "run", "distribute")
"""Kinds that compute nothing, or need several processes."""
WORDS, LENGTH = 24, 6
OTHERS = {
    "optimizer": "optimizer sgd { lr = 0.02, momentum = 0.9, weight_decay = 0.01 }",
    "run": f"run {{ length = {STEPS} steps, seed = 3 }}",
}
"""What a spec needs besides the two clauses, by kind."""
SHARED_SHARE, SMALLEST_SHARE, SHARE_BY_GRAPH = 2, 20, 4
"""One in so many is tried by tests: of the pairs that change the same thing, of the others; by the graph, of those that
share its forward pass."""


class Branch(nn.Module):
    """A convolution, a norm and an activation, whose output is added to the input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = functional.gelu(self.norm(self.conv(x)))
        return found


class Images(nn.Module):
    """A classifier of images, with residual branches, norms and dropout."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(Branch(norm()) for _ in range(2))
        self.mlp, self.dropout = nn.Linear(4, 8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.head(self.dropout(functional.gelu(self.mlp(x.mean((-2, -1))))))
        return found


def _text() -> nn.Module:
    return gpt(2, 8, heads=2, context=LENGTH, vocabulary=WORDS, dropout=0.1)


def _text_with_loss() -> nn.Module:
    return LanguageModel(gpt(2, 8, heads=2, context=LENGTH, vocabulary=WORDS))


def _images() -> nn.Module:
    return Images(lambda: nn.GroupNorm(2, 4))


def _images_over_batches() -> nn.Module:
    return Images(lambda: nn.BatchNorm2d(4))


def _of_zoo(name: str) -> Architecture:
    return next(one for one in own_models.ARCHITECTURES if one.name == name)


_TEXT, _IMAGE = tokens(LENGTH, WORDS), numbers(3, 8, 8)
MODELS = (
    Architecture("text", "torch", _text, _TEXT),
    Architecture("images", "torch", _images, _IMAGE),
    Architecture("images with BatchNorm", "torch", _images_over_batches, _IMAGE),
    replace(_of_zoo("text_own_loss"), name="text with its own loss", build=_text_with_loss),
    _of_zoo("text_of_answers"),
    _of_zoo("encoder"),
    _of_zoo("curve"),
)
"""Where pairs are tried; a construct that none of them fits is told by name."""


@dataclass(frozen=True)
class Found:
    """What became of two constructs, on the model of this name; on none, where no model fits both."""

    first: str
    second: str
    model: str
    outcome: Outcome


def constructs() -> list[str]:
    """Return the names of all constructs that pairs are made of."""
    return sorted(one.heading() for key, one in catalog().items() if key[0] not in APART)


def pairs() -> Iterator[tuple[str, str]]:
    """Yield every two constructs, and each with itself."""
    yield from itertools.combinations_with_replacement(constructs(), 2)


def sample() -> Iterator[tuple[str, str, bool]]:
    """Yield half of the pairs that change the same thing, and a few of the others: what tests can afford.

    The third says whether it is tried by the graph, too: a share of those of which both change the forward pass.
    """
    forward = 0
    for number, (one, two) in enumerate(pairs()):
        shared = _written(one) & _written(two)
        forward += "forward" in shared
        if number % (SHARED_SHARE if shared else SMALLEST_SHARE) == 0:
            yield one, two, "forward" in shared and forward % SHARE_BY_GRAPH == 0


def _written(name: str) -> set[str]:
    return {r for effect in _construct(name).effects for r in effect.writes} - {"metrics"}


def _construct(name: str) -> type[Construct]:
    kind, _, own = name.partition(" ")
    return catalog()[kind, own]


def examine_pair(one: str, two: str, *, graph: bool = True) -> Found:
    """Try two constructs on the first model on which each of them trains alone.

    Without `graph` the modules alone run them.
    """
    for model in MODELS:
        texts = [alone(model.name, name) for name in (one, two)]
        if None not in texts:
            first, second = (text for text in texts if text is not None)
            both = f"{first}\n{second}"
            return Found(one, two, model.name, attempt(partial(_examined, model, both, graph)))
    unfit = [f"{name}: {why_not(name)}" for name in dict.fromkeys((one, two)) if why_not(name)]
    reason = "; ".join(unfit) or "no model of these fits both"
    return Found(one, two, "", Outcome("refused", reason))


@cache
def alone(model: str, construct: str) -> str | None:
    """Return the clause with which a construct trains on a model; None where it is refused there."""
    return next((text for text, found in _alone(model, construct) if found.status == "works"), None)


@cache
def why_not(construct: str) -> str:
    """Return why a construct trains on none of the models; empty where it does."""
    if any(alone(model.name, construct) for model in MODELS):
        return ""
    return next(found.detail for _, found in _alone(MODELS[0].name, construct))


@cache
def _alone(model: str, construct: str) -> list[tuple[str, Outcome]]:
    (architecture,) = [one for one in MODELS if one.name == model]
    found = []
    for _, text in clauses(_construct(construct)):
        found.append((text, attempt(partial(_trains, architecture, text))))
        if found[-1][1].status != "refused":
            break
    return found


def _spec(architecture: Architecture, clause: str) -> str:
    kinds = {line.split()[0] for line in clause.splitlines() if not line.startswith((" ", "}"))}
    others = {"loss": f"loss {architecture.loss}"} | OTHERS
    return "\n".join([*(text for kind, text in others.items() if kind not in kinds), clause])


def _trains(architecture: Architecture, text: str) -> Outcome:
    check_finite(_trained(architecture, text, "module"))
    return Outcome("works")


def _examined(architecture: Architecture, text: str, by_graph: bool) -> Outcome:
    modules, notes = _trained(architecture, text, "module"), []
    check_finite(modules)
    _check_resumed(architecture, text, modules)
    if by_graph:
        try:
            graph = _trained(architecture, text, "graph")
        except GraphRefused as error:
            notes.append(f"no graph: {str(error).splitlines()[0]}")
        else:
            check_equal(modules, graph, architecture.rounding)
    return Outcome("works", "", notes)


def _trained(architecture: Architecture, text: str, executor: Executor) -> Trained:
    spec, _ = resolve_spec(_spec(architecture, text))
    program = trainc.compile(spec, architecture.model(), executor=executor)
    with located(program, spec):
        metrics = [_step(program, architecture, seed) for seed in range(STEPS)]
    return Trained(program, metrics, {}, set(), set())


def _step(program: Program, architecture: Architecture, seed: int) -> dict[str, float]:
    classes, shape = program.loss_fn.of_classes, logits_shape(architecture)
    batch = architecture.batch(seed, BATCH, classes, shape)
    torch.manual_seed(seed)
    ids = torch.arange(BATCH) if program.reads_sample_ids else None
    return program.step(batch, sample_ids=ids)


def _check_resumed(architecture: Architecture, text: str, straight: Trained) -> None:
    """Raise Wrong where a run that is interrupted before its last step is another one."""
    begun = trainc.compile(_spec(architecture, text), architecture.model(), executor="module")
    for seed in range(SAVED):
        _step(begun, architecture, seed)
    state = copy.deepcopy(begun.state_dict())
    resumed = trainc.compile(_spec(architecture, text), architecture.model(), executor="module")
    resumed.load_state_dict(state)
    last = [_step(resumed, architecture, seed) for seed in range(SAVED, STEPS)]
    again = Trained(resumed, last, {}, set(), set())
    wanted = Trained(straight.program, straight.metrics[SAVED:], {}, set(), set())
    try:
        check_equal(wanted, again, 0.0)
    except Wrong as wrong:
        raise Wrong(f"not the same after a resume: {wrong}") from None
