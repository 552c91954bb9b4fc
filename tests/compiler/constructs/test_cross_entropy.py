"""Cross-entropy against its definition, torch's, and exact weights under unequal counts."""

import copy
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import trainc
from trainc.compiler.constructs.loss.cross_entropy import ClassAxis, CrossEntropy
from trainc.compiler.execution.execution import Execution, Executor
from trainc.compiler.method.loss import LossMismatch
from trainc.dsl.values.value_json import Number

LOGITS = torch.randn(5, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
TARGETS[0, 2:] = -100
SOFT = LOGITS.flip(0).softmax(-1)
WEIGHTS = tuple(0.1 * i for i in range(11))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the task and by definition."""
    compiled: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    cases = itertools.product((0.0, 0.1), (None, WEIGHTS), (TARGETS, SOFT))
    for i, (smoothing, weight, targets) in enumerate(cases):
        loss = CrossEntropy(
            label_smoothing=Number(smoothing), class_weight=weight, class_axis="last"
        )
        for out, function in ((compiled, loss.make_loss()), (reference, loss.reference)):
            logits = LOGITS.clone().requires_grad_()
            value = function(logits, targets)
            value.backward()
            assert logits.grad is not None
            out |= {f"loss {i}": value.detach(), f"gradient {i}": logits.grad}
    return compiled, reference


def test_it_is_torchs_bit_for_bit() -> None:
    want = torch.nn.functional.cross_entropy(LOGITS.flatten(0, 1), TARGETS.flatten())
    assert torch.equal(CrossEntropy().make_loss()(LOGITS, TARGETS), want)


def test_weights_are_each_examples_part_of_the_mean() -> None:
    task = CrossEntropy().make_loss()
    lowered = [task(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(5)]
    weights = task.weights(TARGETS)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float((weights * torch.stack(lowered)).sum()) == pytest.approx(
        float(task(LOGITS, TARGETS)), rel=1e-12
    )
    assert task.count(TARGETS) == 30


def test_accuracy_counts_only_what_counts() -> None:
    targets = LOGITS.argmax(-1)
    targets[1] = -100
    assert CrossEntropy().make_loss().metrics(LOGITS, targets) == {"accuracy": (28.0, 28.0)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, (0.5, 1.0, 2.0, 0.0)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3)])
def test_classes_on_axis_1_are_torchs_bit_for_bit(
    shape: tuple[int, ...], soft: bool, weight: tuple[float, ...] | None, smoothing: float
) -> None:
    logits = torch.randn(shape)
    targets = torch.randn(shape).softmax(1) if soft else torch.randint(4, (6, *shape[2:]))
    given = None if weight is None else torch.tensor(weight)
    want = torch.nn.functional.cross_entropy(
        logits, targets, weight=given, label_smoothing=smoothing
    )
    axis: ClassAxis | None = 1 if soft else None  # one reading of indices fits
    loss = CrossEntropy(class_axis=axis, class_weight=weight, label_smoothing=Number(smoothing))
    assert torch.equal(loss.make_loss()(logits, targets), want)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("axis", ["last", 1])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_examples_add_up_to_the_mean(
    axis: ClassAxis, soft: bool, weight: tuple[float, ...] | None
) -> None:
    logits, targets = LOGITS, SOFT if soft else TARGETS
    if axis == 1:
        logits, targets = logits.movedim(-1, 1), SOFT.movedim(-1, 1) if soft else TARGETS
    loss = CrossEntropy(
        class_axis=axis, class_weight=weight, label_smoothing=Number(0.1)
    ).make_loss()
    weights = loss.weights(targets)
    each = [loss(logits[i : i + 1], targets[i : i + 1]) for i in range(5)]
    assert float(weights.sum()) == pytest.approx(1.0)
    torch.testing.assert_close((weights * torch.stack(each)).sum(), loss(logits, targets))
    counts = [loss.count(part) for part in (targets[:2], targets[2:])]
    halves = [loss(logits[:2], targets[:2]), loss(logits[2:], targets[2:])]
    both = sum(count * half for count, half in zip(counts, halves, strict=True)) / sum(counts)
    torch.testing.assert_close(both, loss(logits, targets))


@pytest.mark.parametrize(
    ("fields", "logits", "targets", "says"),
    [
        ({}, (2, 4, 4), torch.zeros(2, 4).long(), "two readings: write `class_axis = last`"),
        ({}, (2, 4, 3), torch.zeros(2, 4, 3), "two readings: write `class_axis = last`"),
        ({"class_axis": 1}, (2, 4, 3), torch.zeros(2, 4).long(), "write `class_axis = last`"),
        ({"class_axis": "last"}, (2, 4, 3), torch.zeros(2, 3).long(), "write `class_axis = 1`"),
        ({}, (2, 4, 3), torch.zeros(2, 5).long(), r"\[2, 4, 3\] and targets \[2, 5\] do not fit"),
        ({}, (2, 4), torch.zeros(2), "Give class indices as int64"),
        ({}, (2, 4), torch.zeros(2).int(), r"`targets\.long\(\)`"),
        ({"ignore_index": 0}, (2, 4), torch.zeros(2, 4), "remove it"),
        ({"class_weight": (1.0,)}, (2, 4), torch.zeros(2).long(), "one number for each class"),
    ],
)
def test_what_does_not_fit_says_what_to_write(
    fields: dict[str, Any], logits: tuple[int, ...], targets: Tensor, says: str
) -> None:
    with pytest.raises(LossMismatch, match=says):
        CrossEntropy(**fields).make_loss()(torch.zeros(logits), targets)


class Words(torch.nn.Module):
    """As many classes as positions; the logits with the classes last, or on axis 1 as torch has them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6)
        self.transposed = transposed

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids))
        return logits.transpose(1, 2) if self.transposed else logits


@pytest.mark.parametrize("soft", [False, True])
def test_a_linear_head_says_where_the_classes_are(soft: bool) -> None:
    ids = torch.randint(0, 6, (3, 6))
    targets = torch.rand(3, 6, 6).softmax(-1) if soft else torch.randint(0, 6, (3, 6))
    spec = "loss cross_entropy optimizer sgd { lr = 0.1 }"
    model = Words(transposed=False)
    logits = model(ids).detach()
    found = trainc.compile(spec, model).step((ids, targets))["loss"]
    rows = targets.flatten(0, 1) if soft else targets.flatten()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows)
    assert found == pytest.approx(float(want), rel=1e-6)
    with pytest.raises(LossMismatch, match="two readings"):
        trainc.compile(spec, Words(transposed=True)).step((ids, targets))


def test_a_batch_that_fits_twice_is_read_as_the_one_before() -> None:
    loss = CrossEntropy().make_loss()
    logits, targets = torch.randn(2, 4, 4), torch.randint(4, (2, 4))
    loss(torch.randn(2, 4, 5), torch.randint(4, (2, 5)))
    want = torch.nn.functional.cross_entropy(logits, targets)
    assert torch.equal(loss(logits, targets), want)


def test_accuracy_of_probabilities_is_of_the_largest() -> None:
    loss = CrossEntropy(class_axis="last").make_loss()
    assert loss.metrics(SOFT, SOFT) == {"accuracy": (35.0, 35.0)}


def test_a_step_whose_classes_all_weigh_nothing_is_the_same_in_micro_batches() -> None:
    text = "loss cross_entropy { class_weight = [1, 0] } optimizer sgd { lr = 1 }"
    text += " run { length = 9 steps, on_nan = skip }"
    x, y = torch.ones(4, 3), torch.tensor([-100, -100, 1, -100])
    whole, divided = (trainc.compile(text, torch.nn.Linear(3, 2)) for _ in range(2))
    want, got = whole.step((x, y)), divided.step([(x[:2], y[:2]), (x[2:], y[2:])])
    assert got == pytest.approx(want, nan_ok=True)
    assert math.isnan(want["gradient_norm"])


def steps_of(fields: str) -> tuple[list[float], trainc.Program]:
    """Return the losses of two steps of a small model of words, two micro-batches each, and the program."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Embedding(19, 8), nn.Tanh(), nn.Linear(8, 19)).double()
    text = (
        f"loss cross_entropy {{ label_smoothing = 0.1 {fields} }} optimizer adamw {{ lr = 0.01 }}"
    )
    program, found = trainc.compile(text, model), []
    for length in (8, 5):
        ids, targets = torch.randint(19, (2, 4, length))
        targets[1, 2:] = -100
        found.append(program.step([(ids[:2], targets[:2]), (ids[2:], targets[2:])])["loss"])
    return found, program


def test_in_chunks_it_trains_as_it_does_whole() -> None:
    (whole, plain), (found, program) = steps_of(""), steps_of(", chunks = 3")
    assert found == pytest.approx(whole, rel=1e-12)
    assert any("linear_cross_entropy" in str(node.target) for node in program.graph.graph.nodes)
    (row,) = program.plan.sites
    assert (row["site"], row["pass"]) == ("loss", "fuse_head")
    assert "linear_cross_entropy in 3 chunks" in row["operator"]
    assert not plain.plan.sites
    for mine, want in zip(program.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


def test_a_graph_in_chunks_is_used_where_modules_have_no_memory_to_compare_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spent(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Execution, "_trial_modules", spent)
    program = trainc.compile(
        "loss cross_entropy { chunks = 2 } optimizer sgd { lr = 1 }", torch.nn.Linear(3, 2)
    )
    program.step((torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))
    assert any("was not compared" in note for note in program.report().notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("chunks = 0", "expected `off`, `auto`, or a whole number of parts"),
        ("chunks = 2, class_axis = 1", "remove it, or `class_axis`"),
        ("chunks = auto, class_weight = [1, 2]", "remove it, or `class_weight`"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(fields: str, message: str) -> None:
    text = f"loss cross_entropy {{ {fields} }} optimizer sgd {{ lr = 1 }}"
    with pytest.raises(trainc.SpecError, match=re.escape(message)):
        trainc.compile(text, torch.nn.Linear(3, 2))


def test_only_the_first_loss_of_a_sum_may_be_in_chunks() -> None:
    text = "loss mse { output = 0, target = 0 } loss cross_entropy { output = 1, target = 1, chunks = 2 }"
    with pytest.raises(trainc.SpecError, match="first loss of a sum"):
        trainc.compile(f"{text} optimizer sgd {{ lr = 1 }}", torch.nn.Linear(3, 2))


@pytest.mark.parametrize("executor", ["module", "graph"])
def test_label_smoothing_may_be_a_schedule(executor: Executor) -> None:
    text = "loss cross_entropy { label_smoothing = linear(0, from = 0.4, over = 4 steps), class_weight = [1, 2, 3] }"
    x, y = torch.randn(6, 2).double(), torch.tensor([0, 1, 2, 0, -100, 1])
    model = torch.nn.Linear(2, 3).double()
    program = trainc.compile(
        f"{text} optimizer sgd {{ lr = 0.1 }}", copy.deepcopy(model), executor=executor
    )
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    for step in range(3):
        smoothing = 0.4 - 0.1 * step
        loss = torch.nn.functional.cross_entropy(model(x), y, weight, label_smoothing=smoothing)
        batch = [(x[:2], y[:2]), (x[2:], y[2:])] if step else (x, y)
        assert program.step(batch)["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.sub_(0.1 * grad)
        want = torch.nn.functional.cross_entropy(
            model(x), y, weight, label_smoothing=smoothing - 0.1
        )
        total, count, _ = program.evaluate((x, y))
        assert total / count == pytest.approx(float(want.detach()), rel=1e-12)


def test_a_rule_sets_the_label_smoothing() -> None:
    rule = "when loss > 0 { cross_entropy.label_smoothing = 1 }"
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 0])
    model = torch.nn.Linear(2, 3).double()
    program = trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 0 }} {rule}", model)
    hard, uniform = (
        float(torch.nn.functional.cross_entropy(model(x), y, label_smoothing=e).detach())
        for e in (0, 1)
    )
    found = [program.step((x, y))["loss"] for _ in range(2)]
    assert found == pytest.approx([hard, uniform], rel=1e-12)


def test_a_schedule_and_chunks_are_refused_together() -> None:
    text = (
        "loss cross_entropy { label_smoothing = linear(0, from = 0.4, over = 4 steps), chunks = 2 }"
    )
    with pytest.raises(trainc.SpecError, match="one number in the whole run as `label_smoothing`"):
        trainc.compile(f"{text} optimizer sgd {{ lr = 1 }}", torch.nn.Linear(3, 2))
