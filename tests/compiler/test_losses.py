"""Losses in whole programs: every form of targets, on both executors, in micro-batches, and measured by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.runtime.data.batch import WrongPick

RUN = "optimizer sgd { lr = 0.1 } run { length = 9 steps, seed = 1 } "
MEASURED = RUN + "noise_scale gns on type(Linear, Conv1d, Conv2d) "
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
EXECUTORS: tuple[Literal["graph", "module"], ...] = ("graph", "module")


@dataclass(frozen=True)
class Case:
    """A loss clause, a model, its batch, and the same loss by torch: a sum over targets, and what divides it."""

    clause: str
    model: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    targets: Callable[[], Tensor]
    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor]


def indices(*shape: int) -> Callable[[], Tensor]:
    """Return class indices of six examples; some of them are ignored, another number in each example."""

    def make() -> Tensor:
        targets = torch.randint(4, (6, *shape))
        targets.view(6, -1)[1, :2] = -100
        targets.view(6, -1)[4, :-1] = -100
        return targets

    return make


def kept(targets: Tensor) -> Tensor:
    return (targets != -100).sum()


def entries(targets: Tensor) -> Tensor:
    return torch.tensor(targets.numel())


def summed(function: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, targets: function(output, targets, reduction="sum", **options)


def weighed(targets: Tensor) -> Tensor:
    return CLASS_WEIGHT[targets[targets != -100]].sum()


def positions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.GELU(), nn.Conv1d(5, 4, 1))


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.GELU(), nn.Conv2d(5, 4, 1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))


def classes_last(output: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(output.movedim(-1, 1), targets, reduction="sum", **options)


CASES = {
    "positions": Case(
        "cross_entropy", positions, (3, 7), indices(7), summed(F.cross_entropy), kept
    ),
    "pixels": Case(
        "cross_entropy { label_smoothing = 0.1 }",
        pixels,
        (3, 7, 6),
        indices(7, 6),
        summed(F.cross_entropy, label_smoothing=0.1),
        kept,
    ),
    "weighed classes": Case(
        "cross_entropy { class_axis = last, class_weight = [0.5, 1, 2, 0], label_smoothing = 0.1 }",
        perceptron,
        (4, 3),
        indices(4),
        lambda o, t: classes_last(o, t, weight=CLASS_WEIGHT, label_smoothing=0.1),
        weighed,
    ),
    "probabilities": Case(
        "cross_entropy",
        perceptron,
        (3,),
        lambda: torch.randn(6, 4).double().softmax(1),
        summed(F.cross_entropy),
        lambda targets: torch.tensor(len(targets)),
    ),
    "probabilities of positions": Case(
        "cross_entropy { class_axis = 1 }",
        positions,
        (3, 7),
        lambda: torch.randn(6, 4, 7).double().softmax(1),
        summed(F.cross_entropy),
        lambda targets: entries(targets[:, 0]),
    ),
    "labels": Case(
        "bce { pos_weight = [0.5, 1, 2, 0] }",
        perceptron,
        (3,),
        lambda: torch.rand(6, 4).double().round(),
        summed(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHT),
        entries,
    ),
    "numbers": Case(
        "huber { delta = 0.5 }",
        perceptron,
        (3,),
        lambda: torch.randn(6, 4).double(),
        summed(F.huber_loss, delta=0.5),
        entries,
    ),
    "absolute": Case(
        "l1", perceptron, (3,), lambda: torch.randn(6, 4).double(), summed(F.l1_loss), entries
    ),
    "squares": Case(
        "mse", perceptron, (3,), lambda: torch.randn(6, 4).double(), summed(F.mse_loss), entries
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


def made(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return case.model().double(), torch.randn(6, *case.inputs).double(), case.targets()


@each_executor
@each_case
def test_examples_are_measured_as_one_backward_pass_each_measures_them(
    case: Case, executor: Literal["graph", "module"]
) -> None:
    model, x, y = made(case)
    program = trainc.compile(f"{MEASURED}loss {case.clause}", model, executor=executor)
    found = program.execution.trial((x, y), executor)
    count = case.count(y)
    torch.testing.assert_close(found.loss, case.total(model(x), y).detach() / count)
    named = dict(model.named_parameters())
    want = {name: torch.zeros(6).double() for name in named}
    for b in range(6):
        loss = case.total(model(x[b : b + 1]), y[b : b + 1]) / count
        for name, gradient in zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True):
            want[name][b] = gradient.square().sum()
    assert set(found.squares) == set(want)
    for name, squares in want.items():
        torch.testing.assert_close(found.squares[name], squares, rtol=1e-9, atol=1e-14)
    for name, squares in program.execution.contributions((x, y)).items():
        torch.testing.assert_close(want[name], squares, rtol=1e-9, atol=1e-14)


@each_executor
@each_case
def test_micro_batches_add_up_to_the_step(case: Case, executor: Literal["graph", "module"]) -> None:
    model, x, y = made(case)
    program = trainc.compile(f"{RUN}loss {case.clause}", model, executor=executor)
    loss = case.total(model(x), y) / case.count(y)
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    want = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), gradients, strict=True)]
    metrics = program.step([(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])])
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, expected in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-12)


class Returns(nn.Module):
    """A linear layer, and whatever is made of its result."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(3, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


class WithLogits(dict[str, Tensor]):
    """An output as transformers has them."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


BATCH = torch.randn(5, 3), torch.randint(4, (5,))


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda y: (y, y.tanh()), "0"),
        (lambda y: (y.tanh(), y), "1"),
        (lambda y: {"a": y, "b": y.tanh()}, '"a"'),
        (lambda y: WithLogits(loss=y.sum(), logits=y), '"logits"'),
        (lambda y: WithLogits(aux_loss=y.sum(), logits=y), '"logits"'),
    ],
)
def test_an_output_of_several_parts_needs_a_choice(
    make: Callable[[Tensor], Any], output: str
) -> None:
    torch.manual_seed(0)
    model = Returns(make)
    with pytest.raises(WrongPick, match=r"rite `output = "):
        trainc.compile(f"{RUN}loss cross_entropy", model, executor="module").step(BATCH)
    want = F.cross_entropy(model.fc(BATCH[0]), BATCH[1]).detach()
    for executor in EXECUTORS:
        spec = f"{RUN}loss cross_entropy {{ output = {output} }}"
        program = trainc.compile(spec, Returns(make), executor=executor)
        program.module.load_state_dict(model.state_dict())
        assert program.step(BATCH)["loss"] == pytest.approx(float(want), rel=1e-6)
        assert program.evaluate(*BATCH)[1] == 5


@pytest.mark.parametrize("output", ['"b"', "2"])
def test_a_part_that_is_not_there_is_an_error(output: str) -> None:
    make: Callable[[Tensor], Any] = (lambda y: {"a": y}) if '"' in output else (lambda y: (y, y))
    spec = f"{RUN}loss cross_entropy {{ output = {output} }}"
    with pytest.raises(WrongPick, match=f"output = {output}"):
        trainc.compile(spec, Returns(make), executor="module").step(BATCH)


def test_entries_without_tensors_and_caches_are_no_second_output() -> None:
    for make in (lambda y: (y, None), lambda y: WithLogits(logits=y, hidden=y)):
        program = trainc.compile(f"{RUN}loss cross_entropy", Returns(make), executor="module")
        assert program.step(BATCH)["loss"] > 0


def test_labels_in_the_inputs_are_two_losses() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=12, n_positions=6)
    ids = torch.randint(12, (2, 6))
    program = trainc.compile(f"{RUN}loss cross_entropy", GPT2LMHeadModel(config))
    with pytest.raises(WrongPick, match=r'`labels`.*`output = "logits"`'):
        program.step(({"input_ids": ids, "labels": ids}, ids))
    assert program.step(({"input_ids": ids}, ids))["loss"] > 0


@pytest.mark.parametrize(
    "clause",
    [
        "regularize r_drop { weight = 0.5 }",
        "regularize distill { weight = 0.5 }",
    ],
)
@each_executor
@pytest.mark.parametrize("soft", [False, True])
def test_terms_of_classes_find_them_on_axis_1(
    clause: str, soft: bool, executor: Literal["graph", "module"]
) -> None:
    """A model that has classes on axis 1 trains as one that has them last."""
    case = CASES["positions"]
    found = []
    for axis in ("1", "last"):
        model, x, y = made(case)
        if soft:
            y = torch.randn(6, 4, 7).double().softmax(1)
        if axis == "last":
            model = nn.Sequential(model, Last())
            y = y.movedim(1, -1) if soft else y
        spec = f"{RUN}loss cross_entropy {{ class_axis = {axis} }} {clause}"
        program = trainc.compile(spec, model, executor=executor)
        found.append([program.step((x + step, y)) for step in range(3)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        "class_axis = 1",
        "class_axis = 1, class_weight = [0.5, 1, 2, 0]",
        "class_axis = last, class_weight = [0.5, 1, 2, 0]",
        "class_axis = last",
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_two_views_are_compared_over_classes_wherever_they_are(fields: str, soft: bool) -> None:
    """The operator of cross-entropy and distance takes some of these, and the others stand beside the distance."""
    torch.manual_seed(0)
    axis = 1 if "axis = 1" in fields else -1
    x, y = torch.randn(6, 5, 3).double(), torch.randint(4, (6, 5))
    y[1, 2:] = -100
    if soft:
        y = torch.randn(6, 5, 4).double().softmax(-1).movedim(-1, axis)
    found = []
    for executor in EXECUTORS:
        torch.manual_seed(1)
        model = nn.Sequential(perceptron(), Moved(axis)).double()
        pace = "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5, distance = kl }"
        spec = f"{RUN}loss cross_entropy {{ {fields} }} {pace}"
        program = trainc.compile(spec, model, executor=executor)
        found.append([program.step((x, y)) for _ in range(2)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
        assert one["consistency"] > 0


@pytest.mark.parametrize("loss", ["bce", "huber", "l1", "mse"])
@pytest.mark.parametrize(
    "clause",
    [
        "regularize r_drop { weight = 1 }",
        "regularize distill { weight = 1 }",
        "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5, distance = kl }",
        "observe calibration",
    ],
)
def test_what_reads_classes_needs_a_loss_of_classes(loss: str, clause: str) -> None:
    with pytest.raises(trainc.SpecError, match="no classes"):
        trainc.compile(f"{RUN}loss {loss} {clause}", perceptron())


class Moved(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, self.axis)


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)
