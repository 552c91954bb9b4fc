"""However a step is divided into micro-batches, it is the same step: loss, terms, signals and gradients.

Steps are drawn with targets that do not count, single ones, all of an example, and all of the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainc
from examples.models import gpt
from tests.conformance import divided
from tests.own_losses import of_rule
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.optimizer import OptimizerStep

EXAMPLES, LENGTH, CLASSES = 5, 4, 7
RUN = " run { length = 40 steps, seed = 3, on_nan = skip } "
SGD = " optimizer sgd { lr = 0.1, momentum = 0.9 } "
ADAMW = " optimizer adamw { lr = 1e-3, clip = 0.01, weight_decay = 0.1 } "
MLP = '"**.blocks.*.mlp.**" & type(Linear)'
PACE = f"regularize pace on {MLP} {{ sigma = 0.8, weight = 0.5 }} "
GNS = "noise_scale gns on type(LayerNorm) { smooth = 2 steps } "
R_DROP = "regularize r_drop { weight = 1 } "
CONSISTENCY = "regularize consistency { target = ema, decay = 0.5, weight = 0.5 } "
DISTILL = "regularize distill { weight = 0.5, temperature = 2 } "
L2_SP = "regularize l2_sp on ndim(2) { weight = 0.01 } "
SIFT = "mask sift on ndim(2) - type(Embedding) { density = 40% } "


class Spread(Construct):
    """Adds the mean over examples of the squared logits."""

    kind: ClassVar = "regularize"
    name: ClassVar = "spread"
    effects: ClassVar = (Effect("forward", "read logits", ("forward",), ("loss",)),)

    def lower(self, to: Lowering) -> None:
        to.term(lambda forward: forward.view(0).square().mean(), over="examples")


def with_(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


ANY = [
    SGD,
    ADAMW,
    " optimizer muon on ndim(2) { lr = 0.1, others = sgd { lr = 0.1 } } ",
    ' optimizer torch("torch.optim:LBFGS") { lr = 0.1, max_iter = 3 } ',
    ' optimizer scipy { method = "CG", lr = 0.1 } ',
    " optimizer swarm { particles = 3, spread = 0.1 } ",
    SGD + L2_SP,
    SGD + "regularize ema { decay = 0.5 }",
    SGD + "regularize swa",
    SGD + "regularize drop_connect on ndim(2) { p = 0.4 }",
    SGD + "regularize mixout on ndim(2) { p = 0.4 }",
    SGD + "regularize orthogonal on ndim(2) { weight = 0.1, form = srip }",
    SGD + "regularize spectral on ndim(2) { weight = 0.1 }",
    SGD + "perturb noise on all { sigma = 0.1, scale = row_norm }",
    SGD + "perturb pac_noise on type(Linear) { samples = 9 }",
    SGD + SIFT,
    SGD + "mask magnitude on ndim(2) every 1 steps { density = 50% }",
    SGD + "mask movement on ndim(2) every 1 steps { density = 50% }",
    SGD + "mask rigl on ndim(2) every 1 steps { density = 50%, replace = 30% }",
    SGD + "mask set on ndim(2) every 1 steps { density = 50%, replace = 30% }",
    SGD + "mask bitfit",
    SGD + "lr trust_ratio",
    SGD + "lr mup { base_width = 4 }",
    SGD + "lr spectral { base_width = 4 }",
    SGD + "lr trust_ratio { of = gradient }",
    SGD + "lr batch_scaling { rule = sqrt, reference = 2 samples }",
    ADAMW + "lr batch_scaling { reference = 2 samples, beta2 = half_life, decay = linear }",
    SGD + "lr temp_balance on type(Linear) every 1 steps { range = 0.5..1.5, min_eigenvalues = 3 }",
    ADAMW + "lr alpha_decay on type(Linear) every 1 steps { min_eigenvalues = 3 }",
    SGD + "perturb sam { rho = 0.5 }",
    SGD + "perturb msam { rho = 0.5 }",
    SGD + "perturb extrapolate { direction = past_gradient, rate = 0.2, look_ahead = 0.9 * lr }",
    SGD + "perturb gradient_norm { radius = 0.5, alpha = 0.7 }",
    SGD + "perturb looksam { rho = 0.5, alpha = 0.7, refresh = 2 steps }",
    SGD + "observe norm_growth every 1 steps { params = encoder }",
    SGD + "observe distance on ndim(2) every 1 steps",
    SGD + "normalize fuse on type(LayerNorm)",
    SGD + GNS,
    SGD + with_(GNS, "type(LayerNorm)", "all"),
    SGD + with_(GNS, "}", ", interval = jackknife }"),
    SGD + with_(GNS, "}", ", geometry = sign }"),
    ADAMW + with_(GNS, "}", ", geometry = adam }"),
    SGD + GNS + SIFT + L2_SP,
    SGD + "spread",
    SGD + GNS + "spread",
    ADAMW + with_(GNS, "}", ", geometry = adam }") + "spread",
]
OF_CLASSES = [
    SGD + R_DROP,
    SGD + DISTILL,
    SGD + with_(DISTILL, "temperature = 2", "top = 2"),
    SGD + "regularize delta on type(LayerNorm) { weight = 0.1 }",
    SGD + CONSISTENCY,
    SGD + with_(CONSISTENCY, "}", ", over = examples, measure = js }"),
    SGD + "regularize z_loss { weight = 0.1 }",
    SGD + GNS + R_DROP,
    SGD + GNS + DISTILL + "spread",
    SGD + "observe calibration { of = training, bins = 3, temperature = true }",
    SGD + "observe margin { of = training }",
    SGD + "observe saturation every 1 steps { c = 20, layers = type(LayerNorm) }",
    SGD + "observe homogeneity every 1 steps { layers = type(LayerNorm) }",
]
OF_TOKENS = [
    SGD + PACE,
    SGD + with_(PACE, "}", ", distance = kl }"),
    SGD + with_(PACE, "}", ", share = none }"),
    SGD + with_(PACE, "}", ", mode = lazy(2) }"),
    SGD + f"observe consistency on {MLP} every 1 steps {{ sigma = 0.1 }}",
    SGD + GNS + PACE,
    SGD + with_(GNS, "}", ", example = document, separator = 0 }"),
    SGD + 'perturb adversarial { norm = l2, radius = 0.1, at = "**.token" }',
    SGD + "lr layer_decay on trainable { decay = 0.5 + 0.4 * progress }",
    SGD + "lr by_type { factors = [2 on type(Embedding), 0.5 on ndim(1)] }",
    SGD + 'regularize drop_path on "**.blocks.*.attn" | "**.blocks.*.mlp" { p = 0.4 }',
    SGD + 'regularize neftune on "**.embed.token" { alpha = 5 }',
    with_(SGD, "sgd", 'sgd on "**.lora.**"')
    + 'adapt lora on "blocks.**" & type(Linear) { rank = 2, alpha = 4 }',
    with_(SGD, "sgd", 'sgd on "**.parallel.**" | "**.apt" | "**.prompt"')
    + 'adapt parallel on "blocks.*.mlp" { rank = 2 } '
    + 'adapt apt on "blocks.*.attn" { tokens = 2 } '
    + 'adapt prompt on "blocks.*" { tokens = 2 }',
    SGD + 'adapt dora on "blocks.**" & type(Linear) { rank = 2, alpha = 4 }',
    SGD + 'mask embedding_rows on "**.embed.token" { last = 3 }',
    SGD + 'mask n_m on "**.fc.weight"',
    SGD + 'mask wanda on "**.fc.weight" { density = 50%, batches = 1 }',
    SGD + 'mask sparsegpt on "**.fc.weight" { density = 50%, batches = 1 }',
    SGD + "mask lisa every 1 steps { active = 1 }",
    SGD + 'adapt lora_mul on "blocks.**" & type(Linear) { rank = 2 }',
]
OF_NUMBERS = [
    SGD + "perturb targets { noise = normal(0.3), weight = 0.5 }",
    SGD
    + 'observe frequency every 1 steps { probe = "tests.compiler.test_any_division:probe", method = projection }',
]
LOSSES = {
    "tokens": "loss cross_entropy",
    "own tokens": "loss model",
    "function of tokens": 'loss call("tests.own_losses:next_word") { counted = shifted_targets }',
    "smooth tokens": "loss cross_entropy { label_smoothing = 0.1, ignore_index = 0 }",
    "classes": "loss cross_entropy",
    "weighted classes": "loss cross_entropy { class_weight = [1, 2, 0, 0.5, 1, 3, 1] }",
    "focal classes": "loss focal { gamma = 1.5 }",
    "preferences": "loss ranked",
    "pairs of answers": "loss dpo",
    "probabilities": "loss cross_entropy",
    "yes or no": "loss bce { pos_weight = 2 }",
    "numbers": "loss mse",
    "near numbers": "loss huber { delta = 0.5 }",
    "distances": "loss l1",
}
CASES = [(k, c) for k in LOSSES for c in ANY]
CASES += [(k, c) for k in LOSSES if "token" in k or "class" in k for c in OF_CLASSES]
CASES += [(k, c) for k in LOSSES if "token" in k for c in OF_TOKENS]
CASES += [(k, c) for k in ("numbers", "near numbers", "distances") for c in OF_NUMBERS]
WHOLE_ONLY = ("perturb ", "LBFGS", "scipy", "swarm")
"""What `program.loss` refuses, because it needs all micro-batches of a step."""
MODULES_ONLY = ("interval = jackknife", "geometry", "example = document", "adversarial")
"""What no graph runs."""


def test_every_construct_takes_part_or_says_why_not() -> None:
    texts = " ".join([*LOSSES.values(), *(clauses for _, clauses in CASES)])
    for (kind, name), construct in trainc.catalog().items():
        if kind not in ("model", "data", "run", "distribute"):  # the last needs processes
            assert f"{kind} {name}" in texts or construct.division, name


def probe() -> Batch:
    """Return inputs and targets whose spectrum is compared."""
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1, keepdim=True).sin().expand(9, CLASSES)


def words() -> nn.Module:
    torch.manual_seed(0)
    return gpt(1, 8, 2, LENGTH, CLASSES).double()


class WithLoss(nn.Module):
    """The language model with a loss of its own, of the next tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = words()

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.model(ids)
        loss = None if labels is None else of_rule(logits, labels, "shifted_targets")
        return {"logits": logits} if loss is None else {"logits": logits, "loss": loss}


def net(*shape: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, math.prod(shape))
    return nn.Sequential(*layers, *([nn.Unflatten(1, shape)] if shape[1:] else [])).double()


@dataclass(frozen=True)
class Division:
    """Steps of examples, what does not count in each, and the sizes of the micro-batches."""

    ignored: tuple[tuple[tuple[bool, ...], ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    seed: int
    by_hand: bool


@st.composite
def divisions(draw: st.DrawFn) -> Division:
    rows = st.one_of(
        st.just((True,) * LENGTH),
        st.just((False,) * LENGTH),
        st.tuples(*[st.booleans()] * LENGTH),
    )
    steps = draw(st.integers(1, 2))
    ignored = tuple(draw(st.tuples(*[rows] * EXAMPLES)) for _ in range(steps))
    sizes = tuple(_sizes(draw(st.tuples(*[st.booleans()] * (EXAMPLES - 1)))) for _ in range(steps))
    return Division(ignored, sizes, draw(st.integers(0, 9)), draw(st.booleans()))


def _sizes(cuts: Sequence[bool]) -> tuple[int, ...]:
    sizes = [1]
    for cut in cuts:
        if cut:
            sizes.append(1)
        else:
            sizes[-1] += 1
    return tuple(sizes)


def batch_of(kind: str, seed: int, ignored: Sequence[Sequence[bool]]) -> Batch:
    made = torch.Generator().manual_seed(seed)
    if "tokens" in kind:
        ids = torch.randint(1, CLASSES, (EXAMPLES, LENGTH + 1), generator=made)
        left_out = 0 if "smooth" in kind else -100
        return ids[:, :-1], ids[:, 1:].masked_fill(torch.tensor(ignored), left_out)
    x = torch.randn(EXAMPLES, 6, generator=made, dtype=torch.float64)
    if "classes" in kind or kind == "preferences":
        mask = torch.tensor([row[0] for row in ignored])
        y = torch.randint(CLASSES, (EXAMPLES,), generator=made).masked_fill(mask, -100)
        return x, y
    if kind == "pairs of answers":
        mask = torch.tensor([(row[:2], row[1:3]) for row in ignored])
        return x, torch.randint(3, (EXAMPLES, 2, 2), generator=made).masked_fill(mask, -100)
    numbers = torch.randn(EXAMPLES, CLASSES, generator=made, dtype=torch.float64)
    if kind == "probabilities":
        return x, numbers.softmax(-1)
    return x, (numbers > 0).double() if kind == "yes or no" else numbers


class Trained:
    """A program that steps from its first state each time, and what its steps left."""

    def __init__(self, kind: str, clauses: str, executor: Any) -> None:
        shape = (2, 2, 3) if kind == "pairs of answers" else (CLASSES,)
        model = WithLoss() if "own" in kind else words() if "tokens" in kind else net(*shape)
        checked = trainc.check(LOSSES[kind] + RUN + clauses.removesuffix("spread")).unwrap()
        spread = [Clause(Spread())] if clauses.endswith("spread") else []
        spec = Spec((*checked.clauses, *spread))
        self.program = trainc.compile(spec, model, executor=executor)
        self.first = copy.deepcopy(self.program.state_dict())
        self.given: dict[str, Tensor] = {}
        for action in self.program.execution.method.actions:
            if isinstance(action, OptimizerStep):
                action.torch.register_step_pre_hook(self._reader(action))

    def _reader(self, action: OptimizerStep) -> Callable[..., None]:
        def read(*_: Any) -> None:
            for slot in action.slots:
                if slot.tensor.grad is not None:
                    self.given[f"gradient of {slot.name}"] = slot.tensor.grad.clone()

        return read

    def run(self, steps: Sequence[Callable[[Program], dict[str, float]]]) -> list[dict[str, Any]]:
        program, found = self.program, list[dict[str, Any]]()
        program.load_state_dict(copy.deepcopy(self.first))
        for step in steps:
            self.given.clear()
            row = {**step(program), **self.given}
            row |= {f"signal {name}": value for name, value in program.signals.items()}
            for name, series in program.report().series.items():
                row |= {f"{name} of {layer}": value for layer, value in series.items()}
            found.append(row)
        found[-1] |= {n: t.clone() for n, t in program.module.state_dict().items()}
        return found


trained = cache(Trained)


def whole(batch: Batch) -> Callable[[Program], dict[str, float]]:
    return lambda program: program.step(batch)


def parts(
    batch: Batch, sizes: Sequence[int], by_hand: bool
) -> Callable[[Program], dict[str, float]]:
    def step(program: Program) -> dict[str, float]:
        micro_batches = divided(batch, sizes)
        counts = [program.loss_fn.count(y) for _, y in micro_batches] if by_hand else []
        if not any(counts):
            return program.step(micro_batches)
        for (x, y), count in zip(micro_batches, counts, strict=True):
            loss = program.loss((x, y), count / sum(counts), len(y) / EXAMPLES)
            if loss.requires_grad:
                loss.backward()
        return program.update()

    return step


def assert_any_division(kind: str, clauses: str, executor: Any, at: Division) -> None:
    ours = trained(kind, clauses, executor)
    batches = [batch_of(kind, at.seed + 10 * n, rows) for n, rows in enumerate(at.ignored)]
    # Before a step that is divided, nothing knows what the model's own loss counts.
    by_hand = at.by_hand and executor == "module" and "own" not in kind
    by_hand = by_hand and not any(w in clauses for w in WHOLE_ONLY)
    want = ours.run([whole(batch) for batch in batches])
    got = ours.run([parts(b, s, by_hand) for b, s in zip(batches, at.sizes, strict=True)])
    for one, two in zip(got, want, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            a, b = (torch.as_tensor(found, dtype=torch.float64) for found in (value, two[name]))
            torch.testing.assert_close(
                a, b, rtol=1e-10, atol=1e-10, equal_nan=True, msg=f"{name}: {a} {b}"
            )


@settings(max_examples=30)
@given(st.sampled_from(CASES), divisions())
def test_modules_run_the_same_step_however_it_is_divided(
    case: tuple[str, str], at: Division
) -> None:
    assert_any_division(*case, "module", at)


GRAPHS = [(k, c) for k, c in CASES if not any(words in c for words in MODULES_ONLY)]


@settings(max_examples=3)
@given(st.sampled_from(GRAPHS), divisions())
def test_graphs_run_the_same_step_however_it_is_divided(
    case: tuple[str, str], at: Division
) -> None:
    assert_any_division(*case, "graph", at)
