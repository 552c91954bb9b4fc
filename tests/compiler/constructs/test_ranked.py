"""Ranked preferences against their definition, in any division of a step, and as a plain function."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import Setup, divided
from trainc import functional
from trainc.compiler.constructs.loss.ranked import Ranked
from trainc.compiler.method.loss import LossMismatch
from trainc.runtime.data.batch import Batch

NAN = float("nan")
GRADES = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, NAN, 1.0], [2.0, 1.0, 0.0]]).double()


class Scorer(nn.Module):
    """Scores answers one by one; an example holds several."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        # A bias of all scores has no gradient: only their differences are trained.
        last = nn.Linear(8, 1, bias=False)
        self.net, self.flat = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), last), flat

    def forward(self, answers: Tensor) -> Tensor:
        scores: Tensor = self.net(answers.flatten(0, 1))
        return scores if self.flat else scores.view(answers.shape[:2])


def pairs(seed: int) -> Batch:
    """Return six pairs of answers; one of the targets does not count."""
    made = torch.Generator().manual_seed(seed)
    best = torch.randint(2, (6,), generator=made)
    best[3] = -100
    return torch.randn(6, 2, 4, generator=made), best


def conformance() -> Setup:
    """Return a scorer and preference pairs."""
    return Setup(model=Scorer, batch=pairs)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient of indices and of grades, by the loss and by definition."""
    scores = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    rule = Ranked()
    for name, targets in (("index", torch.tensor([2, -100, 0, 1])), ("grades", GRADES)):
        for found, lowered in zip(results, (True, False), strict=True):
            compute = rule.make_loss() if lowered else rule.reference
            x = scores.clone().requires_grad_()
            value = compute(x, targets)
            value.backward()
            assert x.grad is not None
            found |= {f"loss of {name}": value.detach(), f"gradient of {name}": x.grad}
    return results


def test_a_pair_is_softplus_of_the_difference() -> None:
    scores = torch.tensor([[0.3, -1.2], [2.0, 0.5]]).double()
    found = Ranked().make_loss()(scores, torch.tensor([0, 1]))
    torch.testing.assert_close(found, F.softplus(torch.tensor([-1.5, 1.5]).double()).mean())
    chosen, rejected = torch.tensor([0.3, 0.5]).double(), torch.tensor([-1.2, 2.0]).double()
    torch.testing.assert_close(functional.ranked_loss(chosen, rejected), found)
    each = functional.ranked_loss(chosen, rejected, "none")
    torch.testing.assert_close(functional.ranked_loss(chosen, rejected, "sum"), each.sum())
    with pytest.raises(ValueError, match="same place of both"):
        functional.ranked_loss(chosen, rejected[:1])
    with pytest.raises(ValueError, match="mean, sum or none"):
        functional.ranked_loss(chosen, rejected, "max")  # type: ignore[arg-type]


def test_what_counts_is_an_example_with_a_pair() -> None:
    loss = Ranked().make_loss()
    assert loss.target_weights(GRADES).tolist() == [1, 0, 1, 1]
    assert loss.target_weights(torch.tensor([0, -100, 1])).tolist() == [1, 0, 1]
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 4)
    assert loss.metrics(scores, GRADES) == {"accuracy": (2.0, 3.0)}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_step_is_the_same_in_micro_batches_of_unequal_counts(executor: Any, flat: bool) -> None:
    spec = "loss ranked optimizer sgd { lr = 0.5 }"
    whole, parts = (
        trainc.compile(spec, Scorer(flat).double(), executor=executor) for _ in range(2)
    )
    for seed in range(2):
        x, y = pairs(seed)
        one = whole.step((x.double(), y))
        two = parts.step(divided((x.double(), y), (1, 3, 2)))
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
    for got, want in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("scores", "targets", "says"),
    [
        (torch.zeros(4, 1), torch.zeros(4).long(), "one score an example"),
        (torch.zeros(4, 3, 5), torch.zeros(4).long(), r"scores \(B, n\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), r"\[4, 3\] and the targets \[4, 2\]"),
        (torch.zeros(4, 3), torch.zeros(4), r"targets\.long\(\)"),
    ],
)
def test_what_does_not_fit_says_what_to_write(scores: Tensor, targets: Tensor, says: str) -> None:
    with pytest.raises(LossMismatch, match=says):
        Ranked().make_loss()(scores, targets)
