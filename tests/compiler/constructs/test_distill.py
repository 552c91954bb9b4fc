"""Distillation: the published numbers, and training equal to a loop by hand with a frozen teacher."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.regularize.outputs.distill import Distill
from trainc.runtime.data.batch import Batch

REFERENCE = Path(__file__).parents[2] / "reference/more_methods.json"
SPEC = "loss cross_entropy optimizer sgd { lr = 0.5 } run { length = 20 steps, seed = 1 } regularize distill"
ALL = torch.ones(1, dtype=torch.bool)


def distill(**fields: Any) -> Distill:
    return Distill(**({"weight": 1.0} | fields))


def published() -> tuple[Tensor, Tensor]:
    """Return the logits of teacher and student that the reference numbers are of."""
    i = torch.arange(8, dtype=torch.float64)
    return 2 * torch.sin(1.7 * i + 0.3)[None], torch.sin(1.7 * i + 1.3)[None]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5)).double()


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 4, generator=made, dtype=torch.float64)
    targets = torch.randint(5, (examples, 3), generator=made)
    targets[0, 1:], targets[4, 0] = -100, -100
    return x, targets


def kl(teacher: Tensor, student: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) by torch's kl_div, over the rows that count."""
    p, q = ((z[counted] / temperature).log_softmax(-1) for z in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def by_hand(
    made: nn.Module, batches: Sequence[list[Batch]], start: int, temperature: float
) -> None:
    """Train with weight 0.7, and with the teacher from step `start` on, when it is copied."""
    teacher = None
    for step, parts in enumerate(batches):
        if step == start:
            teacher = copy.deepcopy(made).eval()
        total = sum(int((y != -100).sum()) for _, y in parts)
        made.zero_grad()
        for x, y in parts:
            logits, counted = made(x), y != -100
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            if teacher is not None:
                with torch.no_grad():
                    fixed = teacher(x)
                loss = loss + 0.7 * kl(fixed, logits, counted, temperature)
            (loss * (int(counted.sum()) / total)).backward()
        torch.optim.SGD(made.parameters(), 0.5).step()


def test_the_divergences_are_the_published_ones() -> None:
    row = json.loads(REFERENCE.read_text())["distill_topk"]
    teacher, student = published()
    assert float(distill().reference(teacher, student, ALL)) == pytest.approx(row["full"], rel=1e-9)
    student.requires_grad_()
    found = distill(top=3).reference(teacher, student, ALL)
    assert float(found.detach()) == pytest.approx(row["topk3"], rel=1e-9)
    found.backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx(row["grad"], abs=1e-6)


def test_all_classes_one_by_one_are_the_whole_divergence() -> None:
    teacher, student = published()
    whole = distill().reference(teacher, student, ALL)
    torch.testing.assert_close(distill(top=8).reference(teacher, student, ALL), whole)
    torch.testing.assert_close(distill(top=7).reference(teacher, student, ALL), whole)


def test_directions_and_temperature_by_kl_div() -> None:
    teacher, student = published()
    forward = distill(temperature=3.0).reference(teacher, student, ALL)
    torch.testing.assert_close(forward, kl(teacher, student, ALL, 3.0))
    reverse = distill(temperature=3.0, direction="reverse").reference(teacher, student, ALL)
    torch.testing.assert_close(reverse, kl(student, teacher, ALL, 3.0))
    both = distill(temperature=3.0, direction="symmetric").reference(teacher, student, ALL)
    torch.testing.assert_close(both, (forward + reverse) / 2)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
def test_masked_classes_add_nothing(direction: Any) -> None:
    teacher, student = published()
    rule = distill(direction=direction)
    wanted = rule.reference(teacher, student, ALL)
    masked = torch.full((1, 2), -torch.inf, dtype=torch.float64)
    own = torch.cat([student, masked], -1).requires_grad_()
    found = rule.reference(torch.cat([teacher, masked], -1), own, ALL)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert own.grad is not None
    assert own.grad[0, :8].isfinite().all()


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("sizes", [(), (1, 2, 3)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_training_is_a_loop_by_hand(executor: Any, sizes: Any, start: int) -> None:
    batches = [divided(b, sizes) if sizes else [b] for b in map(batch, range(5))]
    wanted = model()
    torch.manual_seed(5)
    by_hand(wanted, batches, start, 2.0)
    clause = f" from {start} steps {{ weight = 0.7, temperature = 2 }}"
    program = trainc.compile(SPEC + clause, model(), executor=executor)
    torch.manual_seed(5)
    said = [program.step(parts) for parts in batches]
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert [one["distill"] == 0 for one in said] == [step < start for step in range(5)]


def test_a_resumed_run_has_the_same_teacher() -> None:
    spec = SPEC + " { weight = 0.7 }"
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


def test_top_in_another_direction_is_an_error() -> None:
    with pytest.raises(trainc.SpecError, match="`top` is defined for `direction = forward` alone"):
        trainc.plan(SPEC + " { weight = 1, top = 3, direction = reverse }", model())


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of the second step, by the graph and by definition."""
    made = model().eval().train()
    program = trainc.compile(SPEC + " { weight = 0.7, top = 2 }", made, executor="graph")
    teacher = copy.deepcopy(made).eval()
    program.step(batch(0))
    x, y = batch(1)
    torch.manual_seed(1)
    loss = program.graph((x, y))
    named = dict(made.named_parameters())
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    torch.manual_seed(1)
    logits = made(x)
    with torch.no_grad():
        fixed = teacher(x)
    rule = distill(top=2)
    wanted = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    wanted = wanted + 0.7 * rule.reference(fixed, logits, y != -100)
    found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
