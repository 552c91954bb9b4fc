"""A function as the loss: each reduction is the same mean, and what it returns otherwise is refused at its clause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import Setup
from tests.own_losses import (
    EXECUTORS,
    IGNORED,
    OwnLoss,
    assert_close,
    batch_of,
    counted,
    gradients,
    margin,
    of_rule,
    one_by_one,
    rows,
)
from trainc.compiler.driver.saved_program import LoadError
from trainc.compiler.execution.execution import Executor
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.per_example.loss_counting import LossNotAMean

SGD = " optimizer sgd { lr = 0.1 } run { length = 9 steps, seed = 1 } "
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


class Plain(OwnLoss):
    """Returns logits alone."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.logits(input_ids, attention_mask)


def clause(function: str, fields: str = "") -> str:
    return f'loss call("tests.own_losses:{function}"){f" {{ {fields} }}" * bool(fields)}'


def conformance() -> Setup:
    """Return the small language model under a mean over next tokens."""
    return Setup(usage=clause("next_word"))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return losses by each reduction, and the mean that all of them are."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, 4, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (5, 4), generator=generator)
    targets[0, 1:], targets[3, :2] = IGNORED, IGNORED
    got, want = {}, {}
    for name, fields in (
        ("each_word", "reduction = none, counted = targets"),
        ("sum_of_words", "reduction = sum, counted = targets"),
        ("next_word", "scale = 2"),
    ):
        checked = trainc.check(clause(name, fields))
        assert checked.spec is not None
        construct: Any = checked.spec.clauses[0].construct
        x = output.clone().requires_grad_()
        got[name] = construct.make_loss()(x, targets).detach()
        rule = "shifted_targets" if name == "next_word" else "targets"
        scale = 2 if name == "next_word" else 1
        want[name] = scale * of_rule(output, targets, rule)  # type: ignore[arg-type]
    return got, want


def pair(seed: int = 0) -> tuple[Any, Tensor]:
    batch = batch_of(seed)
    labels = batch.pop("labels")
    return batch, labels


def by_hand(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean that a function's loss is, of one or several examples."""
    logits = model(batch["input_ids"], batch["attention_mask"])
    labels = batch["labels"]
    if name == "each_example":
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (each * (labels != IGNORED) * batch["attention_mask"]).sum(1).mean()
    return of_rule(logits, labels, "shifted_targets" if name == "next_word" else "targets")


CASES = [
    ("next_word", "", "shifted_targets"),
    ("each_word", "reduction = none, counted = targets", "targets"),
    ("sum_of_words", "reduction = sum, counted = targets", "targets"),
    ("each_example", "reduction = none, takes = batch", "examples"),
]
each_case = pytest.mark.parametrize(("name", "fields", "rule"), CASES)


@each_case
@each_executor
@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 1, 3)])
def test_the_step_is_one_mean_however_it_is_divided(
    name: str, fields: str, rule: str, executor: Executor, sizes: tuple[int, ...]
) -> None:
    model, (inputs, labels) = Plain().double(), pair()
    program = trainc.compile(clause(name, fields), model, executor=executor)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [
        (rows(inputs, end - size, end), labels[end - size : end])
        for end, size in zip(ends, sizes, strict=True)
    ]
    found = program.step(parts)
    plain = Plain().double()
    want = by_hand(plain, name, batch_of())
    want.backward()
    assert found["loss"] == pytest.approx(want.item(), rel=1e-12)
    assert_close(gradients(model), gradients(plain))


@each_case
@each_executor
def test_statistics_equal_one_backward_pass_per_example(
    name: str, fields: str, rule: Any, executor: Executor
) -> None:
    model, batch = Plain().double(), pair(1)
    program = trainc.compile(
        clause(name, fields) + " noise_scale gns on all", model, executor=executor
    )
    program.execution.settle([batch])
    weights = counted(batch[1], rule)
    want = one_by_one(model, lambda one: by_hand(model, name, one), batch_of(1), weights)
    fractions = torch.tensor(weights, dtype=torch.float64)
    fractions = fractions / fractions.sum()
    parts = {n: one * fractions.square() for n, one in want.squares().items()}
    how: Any = "graph" if executor == "graph" else "module"
    assert_close(program.execution.trial(batch, how).squares, parts)
    assert_close(program.execution.contributions(batch), parts)
    program.step(batch)
    assert_close(gradients(model), want.mean())
    assert program.graph_refused is None


def test_a_graph_that_cannot_hold_the_function_says_so_and_the_modules_run() -> None:
    model, plain = Plain().double(), Plain().double()
    spec = clause("reading") + " noise_scale gns on all"
    program = trainc.compile(spec, model)
    program.step(pair())
    assert program.graph_refused is not None
    of_rule(plain(*pair()[0].values()), pair()[1], "targets").backward()
    assert_close(gradients(model), gradients(plain))


def test_two_passes_and_the_whole_output() -> None:
    """A term of two passes reads the logits of an output that the function is given whole, or of its part."""
    found = []
    for model, fields in ((Plain(), ""), (OwnLoss(), ', output = "logits"')):
        spec = clause("each_word", f"reduction = none, counted = targets{fields}")
        program = trainc.compile(spec + " regularize r_drop { weight = 0.5 }", model.double())
        found.append(program.step(pair())["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    model, plain = Plain().double(), Plain().double()
    spec = clause("next_word") + ' regularize pace on "mix" { sigma = 1e-9, weight = 1e-9 }'
    got = trainc.compile(spec, model).step(pair())["loss"]
    want = of_rule(plain(*pair()[0].values()), pair()[1], "shifted_targets")
    assert got == pytest.approx(want.item(), rel=1e-7)


def test_sharpness_and_a_sum_with_another_loss() -> None:
    spec = clause("sum_of_words", "reduction = sum, counted = targets, weight = 0.5")
    model, (inputs, labels) = Plain().double(), pair()
    program = trainc.compile(spec + " loss cross_entropy" + SGD, model)
    found = program.step([(rows(inputs, 0, 1), labels[:1]), (rows(inputs, 1, 6), labels[1:])])
    mean = of_rule(Plain().double()(*inputs.values()), labels, "targets").item()
    assert found["loss"] == pytest.approx(1.5 * mean, rel=1e-12)
    trainc.compile(clause("next_word") + " perturb sam { rho = 0.05 }" + SGD, model).step(pair())


@pytest.mark.parametrize(
    ("function", "fields", "message"),
    [
        ("nothing", "", "has no `nothing`"),
        ("alone", "", r"cannot be called with an output, targets and these arguments.*too many"),
        ("next_word", "skale = 2", "unexpected keyword argument 'skale'"),
        ("WORDS", "", "is not callable"),
    ],
)
def test_what_cannot_be_called_is_a_located_error(function: str, fields: str, message: str) -> None:
    spec = "optimizer sgd { lr = 0.1 }\n" + clause(function, fields)
    for make in (trainc.compile, trainc.plan):
        with pytest.raises(trainc.SpecError, match=message) as caught:
            make(spec, Plain())
        assert ":2:" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "fields", "message"),
    [
        ("detached", "", "has no gradient: it was detached"),
        ("as_number", "", "is float, and must be a tensor"),
        ("broken", "", "`tests.own_losses:broken` fails: KeyError: 'nothing here'"),
        (
            "each_word",
            "",
            r"returned the shape \[6, 7\].*`\.mean\(\)`; or write `reduction = none`",
        ),
        ("each_word", "reduction = none", r"\[6, 7\].*each, \[6\]: write `counted = targets`"),
        ("sum_of_words", "reduction = none", r"write `reduction = mean`, or `reduction = sum`"),
    ],
)
def test_what_is_no_loss_says_what_to_write(function: str, fields: str, message: str) -> None:
    program = trainc.compile(clause(function, fields) + SGD, Plain())
    with pytest.raises(LossMismatch, match=message):
        program.step(pair())


@pytest.mark.parametrize(
    ("fields", "shape", "refused"),
    [
        ("", (5,), ""),
        ("counted = targets", (5,), ""),
        ("counted = targets", (5, 3), ""),
        ("", (5, 3), r"cannot tell it here \(.*target.*\): write `counted = examples`"),
    ],
)
def test_a_loss_that_refuses_ignored_targets_counts_all(
    fields: str, shape: tuple[int, ...], refused: str
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, dtype=torch.float64)
    inputs, targets = torch.randn(*shape, 6, dtype=torch.float64), torch.randint(0, 4, shape)
    want = torch.autograd.grad(margin(model(inputs), targets), [*model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    program = trainc.compile(clause("margin", fields) + " noise_scale gns on all" + SGD, model)
    parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    if refused:
        with pytest.raises(LossMismatch, match=refused):
            program.step(parts)
        return
    program.step(parts)
    for p, old, gradient in zip(model.parameters(), before, want, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * gradient, rtol=1e-12, atol=1e-14)


def test_a_list_of_labels_that_ends_in_no_class_is_a_loss_by_examples() -> None:
    model = nn.Linear(6, 4, dtype=torch.float64)
    inputs = torch.randn(5, 6, dtype=torch.float64)
    targets = torch.tensor(
        [[0, 2, -1, 0], [1, -1, 0, 0], [3, 0, 1, -1], [2, -1, 1, 1], [0, 1, 2, 3]]
    )
    want = F.multilabel_margin_loss(model(inputs), targets).item()
    spec = 'loss call("torch.nn.functional:multilabel_margin_loss")'
    parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    with pytest.raises(LossMismatch, match="`counted = examples`"):
        trainc.compile(spec + SGD, model).step(parts)
    program = trainc.compile(f"{spec} {{ counted = examples }}{SGD}", model)
    assert program.step(parts)["loss"] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "fields"),
    [("sum_of_words", ""), ("apart", ""), ("sum_of_words", "counted = examples")],
)
def test_a_mean_that_is_none_is_refused_where_that_counts(function: str, fields: str) -> None:
    program = trainc.compile(clause(function, fields) + SGD, Plain().double())
    inputs, labels = pair()
    program.step((inputs, labels))
    parts = [(rows(inputs, 0, 1), labels[:1]), (rows(inputs, 1, 6), labels[1:])]
    with pytest.raises((LossNotAMean, LossMismatch)):
        program.step(parts)


def test_a_program_that_is_loaded_imports_what_is_trusted(tmp_path: Any) -> None:
    spec = clause("next_word") + " noise_scale gns on all" + SGD
    program = trainc.compile(spec, Plain())
    program.step(pair())
    program.save(tmp_path / "saved")
    with pytest.raises(LoadError, match="only if you trust it"):
        trainc.load(tmp_path / "saved", Plain())
    loaded = trainc.load(tmp_path / "saved", Plain(), trust=["tests.own_losses"])
    assert loaded.step(pair(3))["loss"] == program.step(pair(3))["loss"]
