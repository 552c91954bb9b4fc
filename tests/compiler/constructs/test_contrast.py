"""Supervised contrast: the published numbers, few and no positives, and training equal to a loop by hand."""

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
from trainc import functional
from trainc.compiler.constructs.regularize.features.contrast import Contrast
from trainc.compiler.errors import SiteError
from trainc.runtime.data.batch import Batch

REFERENCE = Path(__file__).parents[2] / "reference/more_methods.json"
SPEC = "loss cross_entropy optimizer sgd { lr = 0.3 } run { length = 20 steps, seed = 1 } "
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def features() -> Tensor:
    i = torch.arange(24, dtype=torch.float64)
    return torch.sin(1.7 * i + 0.3).view(6, 4)


def contrast(**fields: Any) -> Contrast:
    return Contrast.model_validate({"weight": 0.5, "temperature": 0.2} | fields)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the loss and its gradient, as a function and by definition; some rows do not count."""
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    some = torch.tensor([True, False, True, True, True, True])
    for singles in ("skip", "zero"):
        rule = contrast(singles=singles)
        for found, lowered in zip(results, (True, False), strict=True):
            x = features().requires_grad_()
            if lowered:
                value = functional.supcon(x, LABELS, 0.2, rule.singles, some)
            else:
                value = rule.reference(x, LABELS, some)
            value.backward()
            assert x.grad is not None
            found |= {f"loss {singles}": value.detach(), f"gradient {singles}": x.grad}
    return results


def test_it_is_the_published_loss_without_the_anchor_itself() -> None:
    wanted = json.loads(REFERENCE.read_text())["pdc"]["supcon_L_out"]
    assert float(functional.supcon(features(), LABELS, 0.2)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "value"),
    [([0, 1, 2, 3, 4, 5], 0.0), ([0], 0.0), ([3, 3], 0.0), ([0, 0, 1], None)],
    ids=["no positives", "one feature", "one pair alone", "one pair"],
)
def test_few_positives_give_numbers(labels: list[int], value: float | None) -> None:
    x = features()[: len(labels)].requires_grad_()
    found = functional.supcon(x, torch.tensor(labels), 0.2)
    found.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert found.isfinite()
    if value is not None:
        assert float(found.detach()) == value


def test_features_of_zeros_give_finite_gradients() -> None:
    x = torch.zeros(4, 3, requires_grad=True)
    functional.supcon(x, torch.tensor([0, 0, 1, 1])).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(torch.tanh(self.body(x))))
        return logits


def batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (8,), generator=made)
    y[seed % 8] = -100
    return torch.randn(8, 4, generator=made, dtype=torch.float64), y


def by_hand(model: Net, head: nn.Sequential | None, steps: Sequence[list[Batch]]) -> None:
    kept: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, __, y: kept.append(y))
    trained = [*model.parameters(), *(head.parameters() if head else ())]
    optimizer = torch.optim.SGD(trained, 0.3)
    for parts in steps:
        optimizer.zero_grad()
        total = sum(int((y != -100).sum()) for _, y in parts)
        for x, y in parts:
            loss = F.cross_entropy(model(x), y)
            own = kept[-1] if head is None else head(kept[-1])
            loss = loss + 0.5 * contrast().reference(own, y, y != -100)
            (loss * (int((y != -100).sum()) / total)).backward()
        optimizer.step()


@pytest.mark.parametrize("sizes", [(), (3, 5)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("head", ["", ", head = mlp(5, 4)"], ids=["plain", "head"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_training_is_a_loop_by_hand(executor: Any, head: str, sizes: tuple[int, ...]) -> None:
    steps = [divided(b, sizes) if sizes else [b] for b in map(batch, range(3))]
    clause = f'regularize contrast on "norm" {{ weight = 0.5, temperature = 0.2{head} }}'
    program = trainc.compile(SPEC + clause, Net().double(), executor=executor)
    wanted, beside = Net().double(), None
    if head:
        beside = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
        own = dict(program.module.named_parameters())
        with torch.no_grad():
            for name, parameter in beside.named_parameters():
                layer, part = name.split(".")
                parameter.copy_(own[f"norm.contrast.layers.{int(layer) // 2}.{part}"])
    by_hand(wanted, beside, steps)
    for parts in steps:
        program.step(parts)
    for name, want in wanted.named_parameters():
        got = program.module.get_parameter(name)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13, msg=name)
    if beside is not None:
        got = program.module.get_parameter("norm.contrast.layers.1.weight")
        torch.testing.assert_close(got, beside[2].weight, rtol=1e-10, atol=1e-13)
        program.merge()
        assert (
            dict(program.module.named_parameters()).keys() == dict(Net().named_parameters()).keys()
        )


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_views_of_an_example_are_features_of_their_own(executor: Any) -> None:
    clauses = 'regularize r_drop { weight = 0.1 } regularize contrast on "norm" { weight = 1 }'
    program = trainc.compile(SPEC + clauses, Net().double(), executor=executor)
    x, y = batch(0)
    model = Net().double()
    own = model.norm(torch.tanh(model.body(x)))
    want = functional.supcon(own.repeat(2, 1), y.repeat(2), 0.1, "skip", (y != -100).repeat(2))
    assert program.step((x, y))["contrast"] == pytest.approx(float(want.detach()), rel=1e-9)


@pytest.mark.parametrize(
    ("clause", "says"),
    [
        ('on "body" | "norm" { weight = 1 }', "`on` selects 2"),
        ('on "norm" { weight = 1, head = mlp(8, 0) }', "whole numbers such as"),
        ('on "norm" { weight = 1, head = conv(8) }', "no projection head `conv`"),
        ('on "norm" { weight = 1, head = 8 }', "expected a projection head such as"),
        ('on "norm" from 3 steps { weight = 1, head = mlp(8) }', "remove `from 3 steps`"),
    ],
)
def test_a_clause_that_does_not_fit_says_what_to_write(clause: str, says: str) -> None:
    with pytest.raises(trainc.SpecError, match=says):
        trainc.compile(SPEC + "regularize contrast " + clause, Net())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.eye(3)[[0, 1, 2, 0]], "compares features by their classes"),
        (torch.zeros(4).long(), "a vector for each target"),
    ],
)
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_features_that_do_not_fit_say_what_to_write(
    executor: Any, targets: Tensor, says: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Flatten(1, 2), nn.Linear(6, 3))
    program = trainc.compile(
        SPEC + 'regularize contrast on "0" { weight = 1 }', model, executor=executor
    )
    with pytest.raises(SiteError, match=says):
        program.step((torch.randn(4, 2, 4), targets))
