"""R-Drop: the published divergence, and training equal to a loop by hand with the same dropout."""

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
from trainc.compiler.constructs.regularize.outputs.r_drop import RDrop
from trainc.compiler.program.program import Program
from trainc.runtime.data.batch import Batch

REFERENCE = Path(__file__).parents[2] / "reference/regularizers.json"
SPEC = "loss cross_entropy optimizer sgd { lr = 0.2 } run { length = 20 steps, seed = 1 } regularize r_drop"


def tensor(stored: dict[str, Any]) -> Tensor:
    return torch.tensor(stored["data"], dtype=torch.float32).view(*stored["shape"])


def model(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 5)
    ).double()


def batch(seed: int, examples: int = 6) -> Batch:
    """Return examples of three tokens each, some of whose targets do not count."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 4, generator=made, dtype=torch.float64)
    targets = torch.randint(5, (examples, 3), generator=made)
    targets[0, 1:], targets[4, 0] = -100, -100
    return x, targets


def divergence(p: Tensor, q: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of both KL divergences by torch's kl_div, over the rows that count."""
    p, q = p[counted], q[counted]
    one, two = (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
        for a, b in ((p, q), (q, p))
    )
    return (one + two) / 2


def by_hand(made: nn.Module, batches: Sequence[list[Batch]], weight: float) -> list[float]:
    """Train with two passes of every micro-batch in one batch, and return the divergences."""
    said = []
    for parts in batches:
        total = sum(int((y != -100).sum()) for _, y in parts)
        said.append(0.0)
        made.zero_grad()
        for x, y in parts:
            one, two = made(torch.cat([x, x])).chunk(2)
            counted = y != -100
            apart = divergence(one, two, counted)
            share = int(counted.sum()) / total
            losses = [F.cross_entropy(z.flatten(0, 1), y.flatten()) for z in (one, two)]
            ((sum(losses) / 2 + weight * apart) * share).backward()
            said[-1] += float(apart.detach()) * share
        torch.optim.SGD(made.parameters(), 0.2).step()
    return said


def test_the_divergence_is_the_published_one() -> None:
    row = json.loads(REFERENCE.read_text())["relatives"]["rdrop_official_readme"]
    p, q = (tensor(row[name]).requires_grad_() for name in "pq")
    found = RDrop.reference(p, q, torch.ones(3, dtype=torch.bool))
    assert float(found.detach()) == pytest.approx(row["loss_batchmean"], rel=1e-6)
    assert float(found.detach()) * 3 == pytest.approx(row["loss_sum"], rel=1e-6)
    (found * 3).backward()
    torch.testing.assert_close(p.grad, tensor(row["grad_p_sum"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.grad, tensor(row["grad_q_sum"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(), (1, 2, 3)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_training_is_a_loop_by_hand_with_the_same_dropout(executor: Any, sizes: Any) -> None:
    batches = [divided(b, sizes) if sizes else [b] for b in map(batch, range(4))]
    wanted = model()
    torch.manual_seed(5)
    apart = by_hand(wanted, batches, 0.7)
    program = trainc.compile(SPEC + " { weight = 0.7 }", model(), executor=executor)
    torch.manual_seed(5)
    said = [program.step(parts) for parts in batches]
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert [one["r_drop"] for one in said] == pytest.approx(apart, rel=1e-10)
    assert min(apart) > 0
    assert said[0]["loss"] == pytest.approx(said[0]["data_loss"] + 0.7 * apart[0], rel=1e-12)


def test_views_have_dropout_of_their_own_and_pass_once_while_closed() -> None:
    program = trainc.compile(SPEC + " from 1 step { weight = 1 }", model())
    torch.manual_seed(2)
    first = program.step(batch(0))
    assert (first["r_drop"], first["data_loss"]) == (0.0, first["loss"])
    (x, y), made = batch(0), model()
    torch.manual_seed(2)
    plain = F.cross_entropy(made(x).flatten(0, 1), y.flatten())
    assert first["loss"] == float(plain.detach())
    assert program.step(batch(1))["r_drop"] > 0
    assert any("divergence of the two views" in line for line in program.summary())


def test_without_dropout_the_plan_warns() -> None:
    (problem,) = (
        d
        for d in trainc.plan(SPEC + " { weight = 1 }", nn.Linear(4, 5)).warnings
        if "r_drop" in str(d) or "Dropout" in str(d)
    )
    assert "no layer of the model is a Dropout" in str(problem)


@pytest.mark.parametrize(
    "clause", ["r_drop { weight = 1 }", 'pace on "0" { sigma = 1, weight = 1, distance = kl }']
)
def test_a_loss_without_classes_is_an_error(clause: str) -> None:
    spec = f"loss mse optimizer sgd {{ lr = 0.1 }} regularize {clause}"
    with pytest.raises(trainc.SpecError, match="reads probabilities of classes") as caught:
        trainc.plan(spec, nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.1)))
    assert "use a loss of classes" in str(caught.value)


def test_with_another_clause_of_two_views_it_is_an_error() -> None:
    spec = SPEC + ' { weight = 1 } regularize pace on "0" { sigma = 1, weight = 1 }'
    with pytest.raises(trainc.SpecError, match="both set `views`"):
        trainc.plan(spec, model())


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of one step with dropout, by the graph and by definition."""
    made, (x, y) = model(), batch(3)
    program: Program = trainc.compile(SPEC + " { weight = 0.4 }", made, executor="graph")
    torch.manual_seed(1)
    loss = program.graph((x, y))
    named = dict(made.named_parameters())
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    torch.manual_seed(1)
    one, two = made(torch.cat([x, x])).chunk(2)
    losses = [F.cross_entropy(z.flatten(0, 1), y.flatten()) for z in (one, two)]
    wanted = sum(losses) / 2 + 0.4 * RDrop.reference(one, two, y != -100)
    found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
