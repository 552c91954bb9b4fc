"""Several losses in one spec: their sum over parts of outputs and targets, exact however a step is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.method.loss import LossMismatch
from trainc.runtime.data.batch import Batch, WrongBatch, WrongPick
from trainc.runtime.run.summary import evaluate

RUN = "optimizer sgd { lr = 0.1 } run { length = 9 steps, seed = 1 } "
SUM = (
    'loss cross_entropy as words { output = "words", target = "words" }'
    ' loss huber as height { output = "height", target = "height", weight = 0.3 }'
)
EXECUTORS: tuple[Literal["graph", "module"], ...] = ("graph", "module")
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


class TwoHeads(nn.Module):
    """One trunk with a head of words, and one of a height."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.trunk, self.words, self.height = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        hidden = F.gelu(self.trunk(x))
        found = {"words": self.words(hidden), "height": self.height(hidden)[:, 0, 0]}
        return found if self.form == "dict" else tuple(found.values())


def made(form: str = "dict") -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    words = torch.randint(4, (6, 2))
    words[0], words[3, 1], words[5] = -100, -100, -100
    targets: Any = {"words": words, "height": torch.randn(6).double()}
    if form == "tuple":
        targets = tuple(targets.values())
    return TwoHeads(form).double(), (torch.randn(6, 2, 3).double(), targets)


def by_hand(model: nn.Module, x: Tensor, targets: Any, weight: float = 0.3) -> dict[str, Tensor]:
    """Return both losses as sums over what they count, divided as in the whole batch, and the total."""
    words, height = targets.values() if isinstance(targets, dict) else targets
    found = model(x)
    logits, value = found.values() if isinstance(found, dict) else found
    one = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="sum") / 7
    other = F.huber_loss(value, height, reduction="sum") / 6
    return {"words": one, "height": other, "loss": one + weight * other}


def rows(batch: Batch, parts: Sequence[slice]) -> list[Batch]:
    x, targets = batch
    if isinstance(targets, dict):
        return [(x[p], {name: t[p] for name, t in targets.items()}) for p in parts]
    return [(x[p], tuple(t[p] for t in targets)) for p in parts]


SPECS = {"dict": SUM, "tuple": SUM.replace('"words"', "0").replace('"height"', "1")}
DIVISIONS = ((slice(0, 6),), (slice(0, 1), slice(1, 4), slice(4, 6)))


@pytest.mark.parametrize("parts", DIVISIONS, ids=("whole", "divided"))
@pytest.mark.parametrize("form", SPECS)
@each_executor
def test_a_sum_is_of_the_means_of_the_whole_step(
    executor: Literal["graph", "module"], form: str, parts: tuple[slice, ...]
) -> None:
    model, batch = made(form)
    want = by_hand(model, *batch)
    gradients = torch.autograd.grad(want["loss"], [*model.parameters()])
    expected = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), gradients, strict=True)]
    # A micro-batch in which one of the losses counts nothing runs by the modules.
    program = trainc.compile(RUN + SPECS[form], model, executor="auto" if parts[1:] else executor)
    metrics = program.step(rows(batch, parts) if parts[1:] else batch)
    for name, value in want.items():
        assert metrics[name] == pytest.approx(float(value.detach()), rel=1e-12)
    for parameter, one in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", DIVISIONS, ids=("whole", "divided"))
@each_executor
def test_examples_of_a_sum_are_measured_as_one_by_one(
    executor: Literal["graph", "module"], parts: tuple[slice, ...]
) -> None:
    model, batch = made()
    program = trainc.compile(f"{RUN}noise_scale gns on type(Linear) {SUM}", model, executor="auto")
    named = dict(model.named_parameters())
    want = {name: torch.zeros(6).double() for name in named}
    for b, one in enumerate(rows(batch, [slice(b, b + 1) for b in range(6)])):
        found = torch.autograd.grad(
            by_hand(model, *one)["loss"], [*named.values()], allow_unused=True
        )
        for name, gradient in zip(named, found, strict=True):
            want[name][b] = 0.0 if gradient is None else gradient.square().sum()
    if not parts[1:]:
        for squares in (
            program.execution.trial(batch, executor).squares,
            program.execution.contributions(batch),
        ):
            for name, expected in want.items():
                torch.testing.assert_close(squares[name], expected, rtol=1e-9, atol=1e-14)
        return
    program.step(rows(batch, parts))
    last = program._runner.last
    assert last is not None
    seen = last.contributions
    assert float(sum(part.weights.sum() for part in seen)) == pytest.approx(1.0)
    weights = torch.cat([part.weights for part in seen])
    words = torch.tensor([0.0, 2, 2, 1, 2, 0]).double() / 7
    torch.testing.assert_close(weights, (words + 1 / 6) / 2)


@each_executor
def test_the_weight_of_a_loss_follows_the_clock(executor: Literal["graph", "module"]) -> None:
    model, batch = made()
    spec = RUN + SUM.replace("weight = 0.3", "weight = 0.5 * linear(to = 0.1, over = 50%)")
    program = trainc.compile(spec, model, executor=executor)
    for _ in range(3):
        weight = program.loss_weights["height"]
        want = by_hand(model, *batch, weight)["loss"]
        assert program.step(batch)["loss"] == pytest.approx(float(want.detach()), rel=1e-12)
    assert program.loss_weights["height"] < 0.5


def test_one_loss_may_have_a_weight() -> None:
    model, (x, targets) = made()
    plain = trainc.compile(
        f'{RUN}loss huber {{ output = "height" }}', model, executor="module"
    ).step((x, targets["height"]))
    model, _ = made()
    half = trainc.compile(
        f'{RUN}loss huber {{ output = "height", weight = 0.5 }}', model, executor="module"
    ).step((x, targets["height"]))
    assert half["loss"] == pytest.approx(plain["loss"] / 2)
    assert half["huber"] == pytest.approx(plain["loss"])


@each_executor
def test_terms_read_the_first_loss(executor: Literal["graph", "module"]) -> None:
    model, batch = made()
    clause = "regularize distill { weight = 0.5 }"
    program = trainc.compile(RUN + SUM + clause, model, executor=executor)
    want = by_hand(model, *batch)
    first = program.step(batch)
    assert first["distill"] == pytest.approx(0.0, abs=1e-12)
    assert first["data_loss"] == pytest.approx(float(want["loss"].detach()), rel=1e-12)
    assert program.step(batch)["distill"] > 0


@each_executor
def test_every_loss_is_of_both_views(executor: Literal["graph", "module"]) -> None:
    model, batch = made()
    clause = "regularize r_drop { weight = 0.5 }"
    program = trainc.compile(RUN + SUM + clause, model, executor=executor)
    want = by_hand(model, *batch)["loss"]
    assert program.step(batch)["loss"] == pytest.approx(float(want.detach()), rel=1e-12)


@pytest.mark.parametrize("parts", DIVISIONS, ids=("whole", "divided"))
@pytest.mark.parametrize(
    "clause",
    [
        'regularize pace on "trunk" { sigma = 0.3, weight = 0.5, distance = kl }',
        "perturb sam { rho = 0.05 }",
        "regularize distill { weight = 0.5 } noise_scale gns on type(Linear) { method = micro_batch }",
    ],
)
def test_graph_and_modules_compute_the_same_sum(clause: str, parts: tuple[slice, ...]) -> None:
    found = []
    for executor in ("auto", "module"):
        model, batch = made()
        program = trainc.compile(RUN + SUM + clause, model, executor=executor)
        given = rows(batch, parts) if parts[1:] else batch
        found.append([program.step(given) for _ in range(2)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-9, nan_ok=True)


def test_the_division_of_a_step_changes_nothing_with_a_term() -> None:
    found = []
    for parts in DIVISIONS:
        model, batch = made()
        clause = 'regularize pace on "trunk" { sigma = 0.3, weight = 0.5 }'
        clause += " perturb sam { rho = 0.05, with_views = true }"
        program = trainc.compile(RUN + SUM + clause, model)
        metrics = [program.step(rows(batch, parts) if parts[1:] else batch) for _ in range(2)]
        found.append(metrics)
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_strength_zero_is_the_sum_alone() -> None:
    model, batch = made()
    clause = 'regularize pace on "trunk" { sigma = 0.3, weight = 0.5 }'
    program = trainc.compile(RUN + SUM + clause, model)
    want = by_hand(model, *batch)["loss"].detach()
    for executor in EXECUTORS:
        found = program.execution.trial(batch, executor, strength=0.0).loss
        torch.testing.assert_close(found, want)


def test_a_term_is_not_called_as_a_loss() -> None:
    spec = RUN + SUM.replace("as height", "as consistency")
    clause = 'regularize pace on "trunk" { sigma = 0.3, weight = 0.5 }'
    with pytest.raises(trainc.SpecError, match="two terms of the loss"):
        trainc.compile(spec + clause, made()[0])


def test_a_loss_without_a_counted_target_adds_nothing_to_a_step() -> None:
    model, (x, targets) = made()
    targets["words"][:] = -100
    program = trainc.compile(RUN + SUM, model)
    want = F.huber_loss(model(x)["height"], targets["height"])
    metrics = program.step((x, targets))
    assert metrics["loss"] == pytest.approx(0.3 * float(want.detach()), rel=1e-12)
    assert math.isnan(metrics["words"])


def test_an_evaluation_is_of_the_means_of_all_its_batches() -> None:
    model, batch = made()
    program = trainc.compile(RUN + SUM, model)
    program._machine.set_sizes(2, 2)

    class Split:
        def __len__(self) -> int:
            return 6

        def batch(self, indices: Sequence[int]) -> Batch:
            return rows(batch, [slice(indices[0], indices[-1] + 1)])[0]

    class HeldOut:
        train = evaluation = Split()
        tokens_per_sample = 1

    want = by_hand(model, *batch)
    found, _ = evaluate(program, HeldOut(), lambda batch: batch)
    for name, value in want.items():
        assert found[f"eval_{name}"] == pytest.approx(float(value.detach()), rel=1e-12)
    assert found["eval_words_accuracy"] <= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((', target = "words"', ""), 'does not say which it is of: write `target = "words"`'),
        (('target = "height"', 'target = "width"'), "which has no such tensor"),
    ],
)
def test_targets_that_are_not_chosen_are_an_error(change: tuple[str, str], says: str) -> None:
    model, batch = made()
    with pytest.raises(LossMismatch) as error:
        trainc.compile(RUN + SUM.replace(*change), model).step(batch)
    assert says in str(error.value)


def test_an_output_that_is_not_there_names_its_loss() -> None:
    model, batch = made()
    with pytest.raises(WrongPick, match='output = "width"') as error:
        trainc.compile(RUN + SUM.replace('output = "height"', 'output = "width"'), model).step(
            batch
        )
    assert error.value.label == "height"


def test_a_target_of_one_tensor_is_an_error() -> None:
    model, (x, targets) = made()
    spec = f'{RUN}loss huber {{ output = "height", target = "height" }}'
    with pytest.raises(LossMismatch, match="remove `target`"):
        trainc.compile(spec, model).step((x, targets["height"]))


def test_targets_of_different_lengths_are_no_batch() -> None:
    model, (x, targets) = made()
    with pytest.raises(WrongBatch):
        trainc.compile(RUN + SUM, model).step((x, targets | {"height": torch.zeros(5)}))


def test_one_weight_does_not_divide_several_losses() -> None:
    model, batch = made()
    program = trainc.compile(RUN + SUM, model)
    with pytest.raises(ValueError, match="several losses"):
        program.loss(batch, loss_weight=0.5)


def test_two_losses_of_one_name_are_an_error() -> None:
    (error,) = trainc.check("loss mse loss mse").errors
    assert error.rule == "duplicate-label"


def test_a_saved_sum_trains_on(tmp_path: Path) -> None:
    model, batch = made()
    program = trainc.compile(RUN + SUM, model, executor="graph")
    program.step(batch)
    program.save(tmp_path / "saved")
    loaded = trainc.load(tmp_path / "saved", made()[0])
    assert loaded.step(batch)["loss"] == pytest.approx(program.step(batch)["loss"], rel=1e-12)
