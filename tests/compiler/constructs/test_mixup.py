"""Mixup: the loss of a mixture is the mixture of the losses, drawn alike in any division of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import trainc
from tests.conformance import Setup, divided, tiny_gpt, tokens
from trainc.compiler.constructs.regularize.activations.mixup import Mixup
from trainc.compiler.errors import SiteError
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.batches import StepDraws
from trainc.runtime.storage.random_streams import derive_seed

SEED, CLASSES, ALPHA = 3, 4, 0.7
BASE = (
    f"loss cross_entropy optimizer sgd {{ lr = 0.2 }} run {{ length = 40 steps, seed = {SEED} }} "
)
MIXUP = f"regularize mixup {{ alpha = {ALPHA} }}"
BY_EXAMPLE = MIXUP.replace("}", ", share = example }")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=made, dtype=torch.float64)
    return x, torch.randint(CLASSES, (examples,), generator=made)


def parts(step: int, rows: int, first: int = 0, *, by_example: bool = False) -> Tensor:
    """Return which part of each example stays."""
    draws = StepDraws(SEED, "mixup", 0, step, first)
    stream = draws.of_examples() if by_example else draws.of_step()
    if not by_example:
        stream.random()  # whether the step is mixed
    drawn = []
    for _ in range(first + rows if by_example else 1):
        drawn.append(stream.beta(ALPHA, ALPHA))
        stream.random(), stream.random()
    return torch.tensor(drawn, dtype=torch.float64)[-rows:]


def order(step: int, rows: int, first: int = 0) -> Tensor:
    draw = torch.Generator()
    draw.manual_seed(derive_seed(SEED, "batch", "mixup", 0, step, first))
    return torch.randperm(rows, generator=draw)


def by_hand(model: nn.Module, steps: list[list[Batch]], *, by_example: bool = False) -> list[float]:
    """Train with two losses of every mixture, each by its part."""
    losses = []
    for step, micro_batches in enumerate(steps):
        model.zero_grad()
        first, total = 0, sum(len(y) for _, y in micro_batches)
        losses.append(0.0)
        for x, y in micro_batches:
            part = parts(step, len(y), first, by_example=by_example)
            partner = order(step, len(y), first)
            out = model(Mixup.reference(x, partner, part))
            one, two = (cross_entropy(out, t, reduction="none") for t in (y, y[partner]))
            loss = (part * one + (1 - part) * two).sum() / total
            loss.backward()
            losses[-1] += float(loss.detach())
            first += len(y)
        torch.optim.SGD(model.parameters(), 0.2).step()
    return losses


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("clause", [MIXUP, BY_EXAMPLE])
def test_it_is_the_mixture_of_two_losses(clause: str, executor: Any) -> None:
    ours, theirs = net(), net()
    program = trainc.compile(BASE + clause, ours, executor=executor)
    steps = [divided(batch(0), (6,)), divided(batch(1), (2, 4)), divided(batch(2), (3, 3))]
    said = [program.step(one)["loss"] for one in steps]
    assert said == pytest.approx(by_hand(theirs, steps, by_example=clause is BY_EXAMPLE), rel=1e-12)
    assert program.clock.samples == 18
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_an_example_has_its_part_in_any_division() -> None:
    whole = parts(2, 9, by_example=True)
    cut = torch.cat([parts(2, 4, by_example=True), parts(2, 5, 4, by_example=True)])
    assert torch.equal(whole, cut)
    assert len(whole.unique()) == 9


def test_numbers_are_averaged() -> None:
    ours, theirs = net(), net()
    x, _ = batch(0)
    y = torch.randn(6, CLASSES, dtype=torch.float64)
    text = BASE.replace("cross_entropy", "mse") + MIXUP
    said = trainc.compile(text, ours).step((x, y))["loss"]
    part, partner = parts(0, 6), order(0, 6)
    out, wanted = (Mixup.reference(t, partner, part) for t in (x, y))
    assert said == pytest.approx(float(mse_loss(theirs(out), wanted).detach()), rel=1e-12)


def test_a_step_is_mixed_as_often_as_the_probability_says() -> None:
    half = MIXUP.replace("}", ", probability = 50% }")
    plain, mixed = net(), net()
    programs = [trainc.compile(BASE + clause, m) for clause, m in (("", plain), (half, mixed))]
    same = 0
    for seed in range(60):
        mixed.load_state_dict(plain.state_dict())
        one, two = (program.step(batch(seed))["loss"] for program in programs)
        same += one == two
    assert 18 <= same <= 42  # 99.8% of the binomial distribution


def test_a_step_that_is_not_mixed_is_plain_bit_for_bit() -> None:
    models = [net(), net()]
    clauses = "", MIXUP.replace(str(ALPHA), "0 * step")
    programs = [trainc.compile(BASE + c, m) for c, m in zip(clauses, models, strict=True)]
    for seed in range(2):
        one, two = (program.step(batch(seed)) for program in programs)
        assert one == two


def test_what_cannot_be_mixed_is_refused_at_its_clause() -> None:
    words = trainc.compile(BASE + MIXUP, tiny_gpt())
    with pytest.raises(
        SiteError, match="mixes examples, and the inputs are int64: ids of tokens"
    ) as e:
        words.step(tokens(0))
    assert e.value.clause == "mixup"
    x, y = batch(0)
    ignored = y.clone()
    ignored[2] = -100
    dense = nn.Sequential(nn.Linear(5, CLASSES)).double()
    cases = [
        (net(), BASE, (x, ignored), "needs a class for every example, from 0 to 3, and a target is -100"),
        (dense, BASE, (x[:, None], y[:, None]), "needs one class an example, and the targets are"),
    ]  # fmt: skip
    for model, base, given, message in cases:
        with pytest.raises(SiteError, match=message):
            trainc.compile(base + MIXUP, model).step(given)


def conformance() -> Setup:
    """Return a small classifier of vectors."""
    return Setup(lambda: net().float(), lambda seed: (batch(seed)[0].float(), batch(seed)[1]))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what training leaves, by the graph and by two losses of every mixture."""
    ours, theirs = net(), net()
    program = trainc.compile(BASE + MIXUP, ours, executor="graph")
    steps = [divided(batch(seed), (6,)) for seed in range(3)]
    for one in steps:
        program.step(one)
    by_hand(theirs, steps)
    return dict(ours.state_dict()), dict(theirs.state_dict())
