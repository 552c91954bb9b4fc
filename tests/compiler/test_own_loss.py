"""A loop with a loss of its own: `program.micro_batch` and `program.backward`, for any inputs, outputs and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import trainc
from trainc.compiler.errors import SiteError
from trainc.compiler.per_example.weight_uses import WeightUsedElsewhere

SGD = "optimizer sgd { lr = 0.1 }"
GNS = "noise_scale gns on all { smooth = 1 steps }"
LOSS = "loss cross_entropy"
SIZES = (2, 1, 3)


class Heads(nn.Module):
    """Tokens and a mask in by name, a dict of two outputs out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.body = nn.Linear(6, 8)
        self.words = nn.Linear(8, 7)
        self.length = nn.Linear(8, 1)

    def forward(self, *, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(self.norm(self.embed(ids)))) * mask[..., None]
        return {"words": self.words(hidden), "length": self.length(hidden.mean(1))[:, 0]}


def net() -> Heads:
    torch.manual_seed(1)
    return Heads().double()


def data(step: int, examples: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(10 + step)
    mask = (torch.rand(examples, 5) > 0.3).double()
    mask[:, 0] = 1
    ids, words = (torch.randint(0, 7, (examples, 5)) for _ in range(2))
    return {"ids": ids, "mask": mask, "words": words}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each example's loss, (examples,): two heads, the second with a weight."""
    found = model(ids=batch["ids"], mask=batch["mask"])
    words = cross_entropy(found["words"].transpose(1, 2), batch["words"], reduction="none")
    length = (found["length"] - batch["mask"].sum(1)) ** 2
    total: Tensor = (words * batch["mask"]).sum(1) + 0.1 * length
    return total


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def parts(sizes: tuple[int, ...]) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def step(program: Any, model: nn.Module, batch: dict[str, Tensor], sizes: tuple[int, ...]) -> Any:
    """Run one step on a batch in micro-batches of these sizes; the loss is the mean over examples."""
    for rows in parts(sizes):
        one = part(batch, rows)
        count = len(one["ids"])
        with program.micro_batch(count, loss_weight=count / sum(sizes)):
            loss = losses(model, one).mean()
        program.backward(loss)
    return program.update()


@pytest.mark.parametrize("sizes", [(6,), SIZES])
@pytest.mark.parametrize("clauses", ["", GNS])
def test_it_trains_as_a_loop_by_hand(clauses: str, sizes: tuple[int, ...]) -> None:
    ours, hand = net(), net()
    program = trainc.compile(f"{LOSS} {SGD} {clauses}", ours)
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.1)
    for i in range(4):
        found = step(program, ours, data(i), sizes)
        loss = losses(hand, data(i)).mean()
        loss.backward()
        assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert program.clock.steps == 4
    assert program.clock.samples == 24


def squares_one_by_one(
    model: nn.Module, batch: dict[str, Tensor], loss_of: Callable[[nn.Module, Any], Tensor]
) -> list[float]:
    """Return |gradient|^2 of each example's own loss, by one backward pass each."""
    found = []
    for i in range(len(batch["ids"])):
        model.zero_grad()
        loss_of(model, part(batch, slice(i, i + 1))).sum().backward()
        found.append(
            sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        )
    return found


@pytest.mark.parametrize("sizes", [(6,), SIZES])
def test_statistics_of_examples_are_those_of_that_very_loss(sizes: tuple[int, ...]) -> None:
    """B|G|^2 - mean of |g_i|^2, and the reverse, from one backward pass an example: McCandlish et al., appendix A.1."""
    model = net()
    program = trainc.compile(f"{LOSS} {SGD} {GNS}", model)
    own = sum(squares_one_by_one(net(), data(0), losses)) / 6
    whole = net()
    losses(whole, data(0)).mean().backward()
    big = sum(float(p.grad.square().sum()) for p in whole.parameters() if p.grad is not None)
    found = step(program, model, data(0), sizes)
    assert found["gns.signal"] == pytest.approx((6 * big - own) / 5, rel=1e-10)
    assert found["gns.noise"] == pytest.approx((own - big) / (1 - 1 / 6), rel=1e-10)


def test_examples_may_have_weights() -> None:
    """A mean over tokens: an example counts as its tokens do, as with the spec's own loss over the same targets."""
    torch.manual_seed(3)
    ids, targets = torch.randint(0, 7, (4, 5)), torch.randint(0, 7, (4, 5))
    for row, kept in enumerate((5, 1, 3, 2)):
        targets[row, kept:] = -100
    spec = f"{LOSS} {SGD} {GNS}"

    def tokens() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)).double()

    theirs = trainc.compile(spec, tokens(), executor="module").step((ids, targets))
    model = tokens()
    program = trainc.compile(spec, model)
    with program.micro_batch(4, weights=(targets != -100).sum(1), tokens=20):
        loss = cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    program.backward(loss)
    found = program.update()
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        assert found[name] == pytest.approx(value, rel=1e-10, nan_ok=True), name
    assert program.clock.tokens == 20


# clauses that read the pass


def small() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def pair(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(20 + step)
    return torch.randn(6, 5).double(), torch.randint(0, 3, (6,))


@pytest.mark.parametrize(
    "clause",
    [
        "regularize l2_sp on all { weight = 0.3 }",
        "regularize distill { weight = 0.5, temperature = 2 }",
        "observe calibration { bins = 3 }",
        "regularize ema { decay = 0.9 }",
        'mask magnitude on "0.weight" { density = 0.5 }',
    ],
)  # fmt: skip
def test_clauses_act_as_they_do_on_the_specs_own_loss(clause: str) -> None:
    spec = f"{LOSS} {SGD} {clause}"
    theirs_model, model = small(), small()
    theirs = trainc.compile(spec, theirs_model, executor="module")
    program = trainc.compile(spec, model)
    for i in range(3):
        x, y = pair(i)
        expected = theirs.step((x, y))
        for rows in parts(SIZES):
            count = len(y[rows])
            with program.micro_batch(count, loss_weight=count / 6):
                logits = model(x[rows])
                loss = cross_entropy(logits, y[rows])
            program.backward(loss, logits=logits, targets=y[rows], inputs=x[rows])
        found = program.update()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-14, nan_ok=True), name
    for one, other in zip(model.parameters(), theirs_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_model_may_run_several_times_where_nothing_is_measured() -> None:
    ours, hand = small(), small()
    program = trainc.compile(f"{LOSS} {SGD}", ours)
    x, y = pair(0)
    with program.micro_batch(6):
        loss = mse_loss(ours(x), ours(2 * x)) + cross_entropy(ours(x), y)
    program.backward(loss)
    program.update()
    (mse_loss(hand(x), hand(2 * x)) + cross_entropy(hand(x), y)).backward()
    torch.optim.SGD(hand.parameters(), lr=0.1).step()
    for one, other in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# what is refused


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('regularize pace on "0" { sigma = 0.4, weight = 0.1 }', "`pace` passes every example 2 times"),
        ("regularize r_drop { weight = 0.1 }", "`r_drop` passes every example 2 times"),
        ("perturb sam { rho = 0.1 }", "`sam` acts before the first of a step's micro-batches"),
        ("noise_scale gns on all { calibrate = 1 steps }", "`gns` measures examples one at a time"),
    ],
)  # fmt: skip
def test_what_needs_several_passes_names_what_to_call(clause: str, message: str) -> None:
    program = trainc.compile(f"{LOSS} {SGD} {clause}", small())
    with pytest.raises((SiteError, ValueError), match=message) as found, program.micro_batch(6):
        pytest.fail("the block ran")
    assert "program.step(batch)" in str(found.value)


def test_a_graph_that_was_asked_for_is_not_passed_over() -> None:
    program = trainc.compile(f"{LOSS} {SGD}", small(), executor="graph")
    with pytest.raises(SiteError, match='compile with `executor="auto"`'), program.micro_batch(6):
        pytest.fail("the block ran")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"`distill` reads the logits and targets .* `program.backward\(loss, logits=logits, targets=targets\)`"),
        ({"logits": True, "targets": True}, "`distill` runs another model on the same inputs"),
        ({"logits": True, "targets": True, "inputs": True, "rows": 3}, r"`logits` has shape \(3, 3\), and"),
    ],
)  # fmt: skip
def test_what_a_clause_reads_must_be_given(given: dict[str, Any], message: str) -> None:
    model = small()
    program = trainc.compile(f"{LOSS} {SGD} regularize distill {{ weight = 0.5 }}", model)
    x, y = pair(0)
    with program.micro_batch(6):
        logits = model(x)
        loss = cross_entropy(logits, y)
    rows = slice(given.pop("rows", 6))
    values = {"logits": logits[rows], "targets": y[rows], "inputs": x}
    with pytest.raises(ValueError, match=message):
        program.backward(loss, **{name: values[name] for name in given})
    program.discard_step()
    before = [p.detach().clone() for p in model.parameters()]
    with program.micro_batch(6):
        logits = model(x)
    program.backward(cross_entropy(logits, y), logits=logits, targets=y, inputs=x)
    program.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda one: one.item(), TypeError, "the loss is float"),
        (lambda one: one[None], ValueError, r"the loss has shape \(1,\): expected one number"),
        (lambda one: one.detach(), ValueError, "the loss has no gradient"),
    ],
)
def test_a_loss_is_one_number_with_a_gradient(
    loss: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    model = small()
    program = trainc.compile(f"{LOSS} {SGD}", model)
    x, y = pair(0)
    with program.micro_batch(6):
        good = cross_entropy(model(x), y)
    with pytest.raises(error, match=message):
        program.backward(loss(good))
    program.backward(good)  # the micro-batch is still there
    program.update()
    assert program.clock.steps == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"`weights` has shape \(2,\): expected one number for each of the 3 examples"),
        ([1.0, -1.0, 1.0], "`weights` must be finite, 0 or more, and not all 0"),
        ([0.0, 0.0, 0.0], "not all 0"),
        ([1.0, float("nan"), 1.0], "must be finite"),
    ],
)
def test_weights_are_checked(weights: list[float], message: str) -> None:
    program = trainc.compile(f"{LOSS} {SGD}", small())
    with pytest.raises(ValueError, match=message), program.micro_batch(3, weights=weights):
        pytest.fail("the block ran")


@pytest.mark.parametrize("examples", [0, -1, 2.0, None])
def test_the_number_of_examples_is_checked(examples: Any) -> None:
    program = trainc.compile(f"{LOSS} {SGD}", small())
    with (
        pytest.raises(ValueError, match="expected a number of examples"),
        program.micro_batch(examples),
    ):
        pytest.fail("the block ran")


def test_calls_in_another_order_are_errors() -> None:
    model = small()
    program = trainc.compile(f"{LOSS} {SGD}", model)
    x, y = pair(0)
    with pytest.raises(RuntimeError, match="`backward` takes the loss of a micro-batch"):
        program.backward(cross_entropy(model(x), y))
    with program.micro_batch(6):
        with pytest.raises(RuntimeError, match="`micro_batch` is open"), program.micro_batch(6):
            pytest.fail("the block ran")
        with pytest.raises(RuntimeError, match="after its block"):
            program.backward(cross_entropy(model(x), y))
        loss = cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match=r"call `program.backward\(loss\)` before `update`"):
        program.update()
    program.backward(loss)
    with pytest.raises(RuntimeError, match="`backward` takes the loss of a micro-batch"):
        program.backward(loss)
    program.update()
    assert program.clock.steps == 1


def test_an_error_in_the_block_leaves_the_step_as_it_was() -> None:
    ours, other = small(), small()
    program = trainc.compile(f"{LOSS} {SGD} {GNS}", ours)
    undisturbed = trainc.compile(f"{LOSS} {SGD} {GNS}", other)
    x, y = pair(0)
    for one, model in ((program, ours), (undisturbed, other)):
        with one.micro_batch(3, loss_weight=0.5):
            loss = cross_entropy(model(x[:3]), y[:3])
        one.backward(loss)
    with pytest.raises(ZeroDivisionError), program.micro_batch(3, loss_weight=0.5):
        float(ours(x[3:]).detach().sum()) / 0
    found = []
    for one, model in ((program, ours), (undisturbed, other)):
        with one.micro_batch(3, loss_weight=0.5):
            loss = cross_entropy(model(x[3:]), y[3:])
        one.backward(loss)
        found.append(one.update())
    assert str(found[0]) == str(found[1])
    for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_measured_weight_that_serves_elsewhere_is_found() -> None:
    model = small()
    program = trainc.compile(f"{LOSS} {SGD} {GNS}", model)
    x, y = pair(0)
    weight = model.get_parameter("2.weight")
    with program.micro_batch(6):
        loss = cross_entropy(model(x), y) + 0.1 * weight.square().sum()
    with pytest.raises(WeightUsedElsewhere, match=r"`2\.weight` is used more than once"):
        program.backward(loss)


def test_a_measured_layer_that_runs_twice_is_found() -> None:
    model = small()
    program = trainc.compile(f"{LOSS} {SGD} {GNS}", model)
    x, _ = pair(0)
    with pytest.raises(SiteError, match="ran more than once"), program.micro_batch(6):
        model(model(x)[:, :1] * x)
