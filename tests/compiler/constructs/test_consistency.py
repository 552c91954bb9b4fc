"""Consistency: measures by torch's own losses, FixMatch's published number, and training equal to loops by hand."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.regularize.outputs.consistency import Consistency
from trainc.runtime.data.batch import Batch

REFERENCE = Path(__file__).parents[2] / "reference/regularizers.json"
SPEC = "loss cross_entropy optimizer sgd { lr = 0.5 } run { length = 20 steps, seed = 1 } regularize consistency"


def rule(**fields: Any) -> Consistency:
    given: dict[str, Any] = {"target": "start", "weight": 1.0}
    return Consistency(**(given | fields))


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5))
    return made.double()


def batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 4, generator=made, dtype=torch.float64)
    targets = torch.randint(5, (6, 3), generator=made)
    targets[0, 1:], targets[4, 0] = -100, -100
    return x, targets


def pair() -> tuple[Tensor, Tensor]:
    i = torch.arange(20, dtype=torch.float64).reshape(4, 5)
    return 2 * torch.sin(1.7 * i + 0.3), torch.sin(1.7 * i + 1.3)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean over rows of KL(p || q) of probabilities."""
    return F.kl_div(q.log(), p, reduction="batchmean")


def expected(name: str) -> Tensor:
    a, b = pair()
    p, q = a.softmax(-1), b.softmax(-1)
    middle = (p + q) / 2
    return {
        "mse": F.mse_loss(a, b) * 5,
        "mse mean": F.mse_loss(a, b),
        "probabilities mean": F.mse_loss(p, q),
        "kl": kl(p, q),
        "kl reverse": kl(q, p),
        "kl symmetric": (kl(p, q) + kl(q, p)) / 2,
        "js": (kl(p, middle) + kl(q, middle)) / 2,
        "sharpened": kl((a / 0.4).softmax(-1), q),
        "label": F.cross_entropy(b, a.argmax(-1)),
    }[name]


FIELDS: dict[str, dict[str, Any]] = {
    "mse": {},
    "mse mean": {"reduction": "mean"},
    "probabilities mean": {"space": "probabilities", "reduction": "mean"},
    "kl": {"measure": "kl"},
    "kl reverse": {"measure": "kl", "direction": "reverse"},
    "kl symmetric": {"measure": "kl", "direction": "symmetric"},
    "js": {"measure": "js"},
    "sharpened": {"measure": "kl", "sharpen": 0.4},
    "label": {"measure": "kl", "sharpen": 0.0},
}


@pytest.mark.parametrize("name", FIELDS)
def test_measures_are_those_of_torch_and_masked_classes_add_nothing(name: str) -> None:
    target, own = pair()
    measure = rule(**FIELDS[name])
    torch.testing.assert_close(measure.reference(target, own), expected(name))
    masked = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    wide = torch.cat([own, masked], -1).requires_grad_()
    found = measure.reference(torch.cat([target, masked], -1), wide)
    share = 5 / 7 if "mean" in name else 1  # the masked classes are classes of the mean
    torch.testing.assert_close(found, expected(name) * share)
    found.backward()
    assert wide.grad is not None
    assert wide.grad.isfinite().all()


def test_the_masked_term_is_the_published_one() -> None:
    row = json.loads(REFERENCE.read_text())["relatives"]["fixmatch_formula"]
    weak, strong = (
        torch.tensor(row[name]["data"]).view(*row[name]["shape"]) for name in ("weak", "strong")
    )
    found = rule(measure="kl", sharpen=0.0, confidence=row["tau"]).reference(weak, strong)
    assert float(found) == pytest.approx(row["loss"], rel=1e-5)


def test_js_is_at_most_ln_2_and_reached_by_certain_opposites() -> None:
    apart = torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64)
    found = rule(measure="js").reference(apart, apart.flip(-1))
    assert float(found) == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("detach", [None, True])
def test_the_other_view_has_a_gradient_unless_detached(detach: bool | None) -> None:
    target, own = (one.requires_grad_() for one in pair())
    rule(target="view", detach=detach).reference(target, own).backward()
    assert own.grad is not None
    assert (target.grad is None) == bool(detach)
    if target.grad is not None:
        torch.testing.assert_close(target.grad, -own.grad)


def by_hand(made: nn.Module, batches: Sequence[list[Batch]], target: str, over: str) -> None:
    """Train with weight 0.7 and the mean squared difference of probabilities, by its definition."""
    teacher = copy.deepcopy(made).eval()
    for parts in batches:
        total, all_rows = sum(int((y != -100).sum()) for _, y in parts), 18
        made.zero_grad()
        for x, y in parts:
            if target == "view":
                logits, other = made(torch.cat([x, x])).chunk(2)
            else:
                with torch.no_grad():
                    other = teacher(x)
                logits = made(x)
            counted = y != -100
            gap = (logits.softmax(-1) - other.softmax(-1)).square().sum(-1)
            term = gap[counted].sum() / total if over == "targets" else gap.sum() / all_rows
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / total
            (loss + 0.7 * term).backward()
        torch.optim.SGD(made.parameters(), 0.5).step()
        if target == "ema":
            for e, w in zip(teacher.parameters(), made.parameters(), strict=True):
                e.data.mul_(0.6).add_(w.data, alpha=0.4)


@pytest.mark.parametrize(
    ("executor", "sizes", "over"),
    [("graph", (), "targets"), ("module", (1, 2, 3), "targets"), ("graph", (1, 2, 3), "examples")],
)
@pytest.mark.parametrize("target", ["view", "ema", "start"])
def test_training_is_a_loop_by_hand(target: str, executor: Any, sizes: Any, over: str) -> None:
    batches = [divided(b, sizes) if sizes else [b] for b in map(batch, range(4))]
    wanted = model()
    torch.manual_seed(5)
    by_hand(wanted, batches, target, over)
    decay = ", decay = 0.6" if target == "ema" else ""
    fields = f"target = {target}, weight = 0.7, space = probabilities, over = {over}{decay}"
    program = trainc.compile(f"{SPEC} {{ {fields} }}", model(), executor=executor)
    torch.manual_seed(5)
    for parts in batches:
        program.step(parts)
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("executor", "sizes"), [("graph", ()), ("module", (1, 2, 3))])
def test_a_history_compares_with_the_last_visit_and_adds_nothing_at_the_first(
    executor: Any, sizes: Any
) -> None:
    fields = "target = history, weight = 0.7, measure = js, over = examples"
    program = trainc.compile(f"{SPEC} {{ {fields} }}", model(), executor=executor)
    wanted, table = model(), dict[int, Tensor]()
    for seed, first in enumerate((0, 3, 2)):
        (x, y), ids = batch(seed), torch.arange(first, first + 6)
        given: Any = {"sample_ids": list(ids.split(sizes)) if sizes else ids}
        torch.manual_seed(seed)
        said = program.step(divided((x, y), sizes) if sizes else (x, y), **given)
        torch.manual_seed(seed)
        logits = torch.cat([wanted(part) for part in (x.split(sizes) if sizes else [x])])
        q, term = logits.softmax(-1), torch.zeros((), dtype=torch.float64)
        for row, i in enumerate(ids.tolist()):
            if i in table:
                p = table[i].softmax(-1)
                middle = (p + q[row]) / 2
                term = term + (kl(p, middle) + kl(q[row], middle)) / 2 * 3 / 18
        table |= {i: z.detach().half().double() for i, z in zip(ids.tolist(), logits, strict=True)}
        assert said["consistency"] == pytest.approx(float(term.detach()), rel=1e-6, abs=1e-12)
        wanted.zero_grad()
        (F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.7 * term).backward()
        torch.optim.SGD(wanted.parameters(), 0.5).step()
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_a_resumed_run_has_the_same_average() -> None:
    spec = SPEC + " { target = ema, weight = 0.7, decay = 0.5 }"
    program = trainc.compile(spec, model())
    torch.manual_seed(1)
    for seed in range(2):
        program.step(batch(seed))
    state = copy.deepcopy(program.state_dict())
    torch.manual_seed(2)
    program.step(batch(2))
    other = trainc.compile(spec, model())
    other.load_state_dict(state)
    torch.manual_seed(2)
    other.step(batch(2))
    for got, want in zip(other.module.parameters(), program.module.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("measure", ["logits", "probabilities"])
def test_a_loss_of_numbers_has_the_distance_of_outputs_alone(measure: str) -> None:
    clause = f"consistency {{ target = start, weight = 1, space = {measure} }}"
    spec = f"loss mse optimizer sgd {{ lr = 0.1 }} regularize {clause}"
    if measure == "probabilities":
        with pytest.raises(trainc.SpecError, match="reads probabilities of classes"):
            trainc.plan(spec, nn.Linear(4, 5))
        return
    made = nn.Linear(4, 5).double()
    start = copy.deepcopy(made)
    program = trainc.compile(spec, made)
    x = batch(0)[0][:, 0]
    given = x, torch.zeros(6, 5, dtype=torch.float64)
    program.step(given)
    gap = float((made(x) - start(x)).square().sum(-1).mean().detach())
    assert program.step(given)["consistency"] == pytest.approx(gap, rel=1e-10)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("target = view, decay = 0.9", "`decay` needs `target = ema`"),
        ("target = ema, max_table = 1", "`max_table` needs `target = history`"),
        ("target = ema, decay = 1", "must be below 1"),
        ("target = ema, measure = kl, space = logits", "remove `space = logits`"),
        ("target = ema, measure = js, direction = reverse", "remove `direction`"),
        ("target = start, detach = false", "remove `detach = false`"),
        ("target = start, sharpen = 0.4", "write `space = probabilities`"),
        ("target = view, measure = kl, sharpen = 0.4", "add `detach = true`"),
    ],
)
def test_fields_that_do_not_fit_together_are_errors(fields: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match=said):
        trainc.plan(f"{SPEC} {{ {fields}, weight = 1 }}", model())


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of the second step, by the graph and by definition."""
    made = model().eval().train()
    clause = " { target = start, weight = 0.7, measure = js }"
    program = trainc.compile(SPEC + clause, made, executor="graph")
    start = copy.deepcopy(made).eval()
    program.step(batch(0))
    x, y = batch(1)
    torch.manual_seed(1)
    loss = program.graph((x, y))
    named = dict(made.named_parameters())
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    torch.manual_seed(1)
    logits = made(x)
    with torch.no_grad():
        fixed = start(x)
    wanted = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    wanted = wanted + 0.7 * rule(measure="js").reference(fixed, logits, y != -100)
    found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
