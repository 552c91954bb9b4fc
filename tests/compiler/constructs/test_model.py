"""The model's own loss: exact however a step is divided, example by example, and refused where it would be wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from examples.models import gpt
from tests.conformance import Setup, tokens
from tests.own_losses import (
    EXECUTORS,
    IGNORED,
    WORDS,
    Output,
    OwnLoss,
    Rule,
    assert_close,
    batch_of,
    counted,
    gradients,
    of_rule,
    one_by_one,
    rows,
)
from trainc.compiler.execution.execution import Executor
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.per_example.loss_counting import LossNotAMean
from trainc.runtime.data.batch import WrongBatch, WrongPick

RULES: tuple[Rule, ...] = ("targets", "shifted_targets", "examples")
SGD = " optimizer sgd { lr = 0.1 } run { length = 9 steps, seed = 1 } "
each_executor = pytest.mark.parametrize("executor", EXECUTORS)
each_rule = pytest.mark.parametrize("rule", RULES)


class WithLoss(nn.Module):
    """The small language model with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gpt = gpt(layers=2, width=16, heads=2, context=8, vocabulary=24)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.gpt(ids)
        loss = None if labels is None else of_rule(logits, labels, "targets")
        return Output(logits, loss)


def conformance() -> Setup:
    """Return the small language model with a loss of its own."""
    return Setup(model=WithLoss, batch=tokens)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of a batch in uneven micro-batches, and of the model's loss of the whole batch."""
    model, batch = OwnLoss().double(), batch_of()
    loss = model(**batch).loss
    loss.backward()
    want = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
    ours = OwnLoss().double()
    program = trainc.compile("loss model", ours)
    metrics = program.step([rows(batch, 0, 1), rows(batch, 1, 6)])
    got = {"loss": torch.tensor(metrics["loss"], dtype=torch.float64)}
    return got | {n: p.grad for n, p in ours.named_parameters()}, want  # type: ignore[return-value]


@each_rule
@each_executor
@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 1, 3)])
def test_the_step_is_the_model_s_own_loss_however_it_is_divided(
    rule: Rule, executor: Executor, sizes: tuple[int, ...]
) -> None:
    model, batch = OwnLoss(rule).double(), batch_of()
    program = trainc.compile("loss model", model, executor=executor)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [rows(batch, end - size, end) for end, size in zip(ends, sizes, strict=True)]
    found = program.step(parts)
    plain = OwnLoss(rule).double()
    want = plain(**batch).loss
    want.backward()
    assert found["loss"] == pytest.approx(want.item(), rel=1e-12)
    assert_close(gradients(model), gradients(plain))


@each_rule
@each_executor
def test_statistics_equal_one_backward_pass_per_example(rule: Rule, executor: Executor) -> None:
    model, batch = OwnLoss(rule).double(), batch_of(1)
    spec = "loss model noise_scale gns on all"
    program = trainc.compile(spec, model, executor=executor)
    pair = program.execution.losses.batch(batch)
    program.execution.settle([pair])
    want = one_by_one(model, lambda one: model(**one).loss, batch, counted(batch["labels"], rule))
    weights = torch.tensor(want.weights, dtype=torch.float64)
    torch.testing.assert_close(
        program.execution.losses.example_weights(pair[1], {}), weights / weights.sum()
    )
    parts = {n: one * (weights / weights.sum()).square() for n, one in want.squares().items()}
    squares = program.execution.trial(pair, "graph" if executor == "graph" else "module").squares
    assert_close(squares, parts)
    assert_close(program.execution.contributions(pair), parts)
    program.step(batch)
    assert_close(gradients(model), want.mean())


def test_a_pair_and_a_dict_give_the_same_step() -> None:
    batch = batch_of()
    inputs = {name: one for name, one in batch.items() if name != "labels"}
    found = []
    for given in (batch, (inputs, batch["labels"]), (inputs, {"labels": batch["labels"]})):
        model = OwnLoss().double()
        program = trainc.compile("loss model" + SGD, model)
        found.append((program.step(given), model.state_dict()))
    for metrics, weights in found[1:]:
        assert metrics == found[0][0]
        assert all(torch.equal(one, found[0][1][name]) for name, one in weights.items())


def test_one_step_is_plain_torch_bit_for_bit() -> None:
    model, plain, batch = OwnLoss(drop=0.3), OwnLoss(drop=0.3), batch_of()
    program = trainc.compile("loss model" + SGD, model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for seed in range(2):
        torch.manual_seed(seed)
        program.step(batch)
        torch.manual_seed(seed)
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_finding_what_counts_changes_nothing() -> None:
    """The first divided step tries a few passes; random numbers, buffers and modes are those of before."""
    model = OwnLoss(drop=0.3)
    model.norm.eval()
    program = trainc.compile("loss model", model)
    batch = batch_of()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    program.execution.settle([program.execution.losses.batch(batch)])
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.norm.training) == (True, False)
    assert not gradients(model)
    assert program.loss_fn.found == "shifted_targets"  # type: ignore[attr-defined]


class Classes(nn.Module):
    """One label an example: classes by default, or numbers."""

    def __init__(self, form: str = "classes") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.form = nn.Linear(4, 8), nn.Linear(8, 3), form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        if labels is None:
            return {"logits": logits}
        if self.form == "numbers":
            return {"loss": F.mse_loss(logits, labels), "logits": logits}
        if self.form == "one":
            return F.cross_entropy(logits, labels)
        if self.form == "sum":
            return {"loss": F.cross_entropy(logits, labels, reduction="sum"), "logits": logits}
        if self.form == "pairs":
            return {"loss": torch.logsumexp(logits @ logits.T, 1).mean(), "logits": logits}
        if self.form == "onehot":
            p = F.one_hot(labels, 3).to(logits.dtype)
            return {"loss": F.cross_entropy(logits, p), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def classes(form: str, count: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (count,), generator=generator)
    if form == "classes":
        labels[3] = IGNORED
    numbers = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": numbers if form == "numbers" else labels}


@pytest.mark.parametrize("form", ["classes", "numbers", "one", "onehot"])
@each_executor
def test_one_label_an_example(form: str, executor: Executor) -> None:
    model, plain, batch = Classes(form).double(), Classes(form).double(), classes(form)
    program = trainc.compile("loss model noise_scale gns on all", model, executor=executor)
    found = program.step([rows(batch, 0, 2), rows(batch, 2, 5)])
    out = plain(**batch)
    loss = out if form == "one" else out["loss"]
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("form", ["sum", "pairs"])
def test_what_is_no_mean_over_examples_is_refused_where_that_counts(form: str) -> None:
    model, plain, batch = Classes(form).double(), Classes(form).double(), classes(form)
    program = trainc.compile("loss model" + SGD, model)
    whole = program.step(batch)  # one micro-batch is what the model says
    assert whole["loss"] == pytest.approx(plain(**batch)["loss"].item(), rel=1e-12)
    with pytest.raises(LossNotAMean, match=r"no mean of the losses of each"):
        program.step([rows(batch, 0, 2), rows(batch, 2, 5)])
    with pytest.raises(LossNotAMean, match=r"no mean of the losses of each"):
        trainc.compile("loss model noise_scale gns on all", model).step(batch)


@each_rule
@pytest.mark.parametrize("written", RULES)
def test_what_is_written_is_confirmed_or_refused(rule: Rule, written: Rule) -> None:
    batch = batch_of()
    program = trainc.compile(f"loss model {{ counted = {written} }}" + SGD, OwnLoss(rule).double())
    parts = [rows(batch, 0, 1), rows(batch, 1, 6)]
    if rule == written:
        program.step(parts)
        return
    with pytest.raises(LossMismatch, match=rf"`counted = {written}` does not fit.*= {rule}`"):
        program.step(parts)


def test_what_cannot_be_told_asks_for_what_is_counted() -> None:
    """A loss whose gradient is the same for all examples tells nothing."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": self.bias + 0 * labels.double().mean()}

    batch = {"x": torch.zeros(4, 3), "labels": torch.ones(4, 3, dtype=torch.int64)}
    program = trainc.compile("loss model" + SGD, Bias())
    parts = [rows(batch, 0, 1), rows(batch, 1, 4)]
    with pytest.raises(LossMismatch, match=r"write `counted = examples`"):
        program.step(parts)
    trainc.compile("loss model { counted = examples }" + SGD, Bias()).step(parts)


def test_nothing_says_what_counts_before_it_is_known() -> None:
    batch = batch_of()
    program = trainc.compile("loss model" + SGD, OwnLoss().double())
    with pytest.raises(LossMismatch, match="not known yet"):
        program.loss_fn.count(batch["labels"])
    program.step([rows(batch, 0, 1), rows(batch, 1, 6)])
    wanted = sum(counted(batch["labels"], "shifted_targets"))
    assert program.loss_fn.count(batch["labels"]) == wanted


@each_rule
@pytest.mark.parametrize("length", [2, 3, 4])
def test_few_tokens_tell_what_counts(rule: Rule, length: int) -> None:
    """Whatever the first examples have of labels, and however short they are."""
    for seed in range(4):
        batch = batch_of(seed, 6, length + 2)
        batch = {name: one[:, :length].clone() for name, one in batch.items()}
        batch["labels"][:, -1] = batch["input_ids"][:, -1]
        plain, model = OwnLoss(rule).double(), OwnLoss(rule).double()
        program = trainc.compile("loss model", model)
        found = program.step([rows(batch, 0, 1), rows(batch, 1, 6)])
        assert found["loss"] == pytest.approx(plain(**batch).loss.item(), rel=1e-12)


def test_evaluation_weighs_batches_by_what_counts() -> None:
    model, batch = OwnLoss().double(), batch_of()
    program = trainc.compile("loss model" + SGD, model)
    found = [program.evaluate(part) for part in (rows(batch, 0, 1), rows(batch, 1, 6))]
    total, count = (sum(one[i] for one in found) for i in (0, 1))  # type: ignore[misc]
    model.eval()
    assert count == sum(counted(batch["labels"], "shifted_targets"))
    assert total / count == pytest.approx(float(model(**batch).loss.detach()), rel=1e-12)


# with what other clauses do


def test_two_passes_train_the_mean_of_both() -> None:
    """A term of two passes reads logits of the next tokens that count, and the loss is that of both."""
    model, batch = OwnLoss(drop=0.3).double(), batch_of()
    spec = "loss model regularize r_drop { weight = 0.7 }"
    found = []
    for executor in EXECUTORS:
        program = trainc.compile(spec, copy.deepcopy(model), executor=executor)
        torch.manual_seed(3)
        found.append((program.step(batch), gradients(program.module)))
        assert program.graph_refused is None
    torch.manual_seed(3)
    both = {name: torch.cat([one, one]) for name, one in batch.items()}
    out = model(**both)
    first, second = out.logits.log_softmax(-1).chunk(2)
    divergence = 0.5 * (
        F.kl_div(first, second, reduction="none", log_target=True)
        + F.kl_div(second, first, reduction="none", log_target=True)
    ).sum(-1)
    kept = batch["labels"][:, 1:] != IGNORED
    total = out.loss + 0.7 * divergence[:, :-1][kept].mean()
    total.backward()
    for metrics, own in found:
        assert metrics["loss"] == pytest.approx(total.item(), rel=1e-9)
        assert_close(own, gradients(model))


@each_executor
def test_the_loss_of_the_first_pass_leaves_out_the_labels_of_others(executor: Executor) -> None:
    """With a weight near 0 of the term, the step is that of one pass without noise."""
    model, plain, batch = OwnLoss().double(), OwnLoss().double(), batch_of()
    spec = 'loss model regularize pace on "mix" { sigma = 1e-9, weight = 1e-9 }'
    program = trainc.compile(spec, model, executor=executor)
    found = program.step(batch)
    loss = plain(**batch).loss
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-7)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-6, atol=1e-8)


def test_the_first_pass_of_numbers_is_refused() -> None:
    spec = 'loss model regularize pace on "body" { sigma = 0.1, weight = 0.1 }'
    program = trainc.compile(spec, Classes("numbers").double())
    with pytest.raises(LossMismatch, match="loss of the first pass"):
        program.step(classes("numbers"))


def test_sharpness_takes_the_gradient_of_the_loss_at_the_other_weights() -> None:
    model, plain, batch = OwnLoss().double(), OwnLoss().double(), batch_of()
    program = trainc.compile("loss model perturb sam { rho = 0.05 }" + SGD, model)
    program.step([rows(batch, 0, 1), rows(batch, 1, 6)])
    plain(**batch).loss.backward()
    own = gradients(plain)
    norm = torch.stack([g.norm() for g in own.values()]).norm()
    kept = {n: p.detach().clone() for n, p in plain.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.add_(own[name] * 0.05 / norm)
    plain.zero_grad()
    plain(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        want = kept[name] - 0.1 * gradients(plain)[name]
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-8, atol=1e-10)


def test_ghost_batches_normalize_under_the_model_s_own_loss() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))
            return (
                {"loss": F.cross_entropy(logits, labels), "logits": logits}
                if labels is not None
                else logits
            )

    generator = torch.Generator().manual_seed(0)
    batch = {
        "x": torch.randn(8, 1, 5, 5, generator=generator).double(),
        "labels": torch.randint(0, 3, (8,), generator=generator),
    }
    model, plain = Image().double(), Image().double()
    program = trainc.compile("loss model normalize ghost_batch { size = 4 }" + SGD, model)
    found = program.step(batch)
    halves = [plain(**rows(batch, at, at + 4))["loss"] for at in (0, 4)]
    assert found["loss"] == pytest.approx(((halves[0] + halves[1]) / 2).item(), rel=1e-9)


def test_a_sum_with_a_loss_of_the_spec() -> None:
    batch = classes("classes")
    model, plain = Classes().double(), Classes().double()
    spec = (
        "loss model { weight = 0.5 } loss cross_entropy as again"
        ' { output = "logits", label_smoothing = 0.1, weight = 2 }'
    )
    program = trainc.compile(spec, model)
    found = program.step([rows(batch, 0, 2), rows(batch, 2, 5)])
    out = plain(**batch)
    smooth = F.cross_entropy(out["logits"], batch["labels"], label_smoothing=0.1)
    total = 0.5 * out["loss"] + 2 * smooth
    total.backward()
    assert found["loss"] == pytest.approx(total.item(), rel=1e-12)
    assert found["model_loss"] == pytest.approx(out["loss"].item(), rel=1e-12)
    assert_close(gradients(model), gradients(plain))


class TwoLosses(Classes):
    """Returns a second loss beside the first, inside of it, or a number that trains nothing."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found = super().forward(x, labels)
        other = found["logits"].square().mean()
        if self.form == "inside":
            found["loss"] = found["loss"] + 0.1 * other
        return {**found, "aux_loss": other.detach() if self.form == "shown" else other}


def test_a_loss_beside_the_loss_is_refused_or_summed() -> None:
    batch = classes("classes")
    with pytest.raises(WrongPick, match=r"`aux_loss` beside its loss, which does not hold it"):
        trainc.compile("loss model" + SGD, TwoLosses().double()).step(batch)
    for form in ("inside", "shown"):
        trainc.compile("loss model" + SGD, TwoLosses(form).double()).step(batch)
    spec = 'loss model as main { output = "loss" } loss model as aux { output = "aux_loss", weight = 3 }'
    model, plain = TwoLosses().double(), TwoLosses().double()
    found = trainc.compile(spec, model).step(batch)
    out = plain(**batch)
    (out["loss"] + 3 * out["aux_loss"]).backward()
    assert found["aux"] == pytest.approx(out["aux_loss"].item(), rel=1e-12)
    assert_close(gradients(model), gradients(plain))


class Pair(nn.Module):
    """Takes its labels by another name, and returns logits and loss as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnLoss("targets")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.inner.logits(idx)
        return logits, None if targets is None else of_rule(logits, targets, "targets")


@each_executor
def test_other_names_and_a_tuple(executor: Executor) -> None:
    batch = batch_of()
    model, plain = Pair().double(), Pair().double()
    spec = 'loss model { labels = "targets" } noise_scale gns on all'
    program = trainc.compile(spec, model, executor=executor)
    program.step((batch["input_ids"], batch["labels"]))
    plain(batch["input_ids"], batch["labels"])[1].backward()
    assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("ignored", [-1, 3])
def test_another_ignored_value_has_to_be_written(ignored: int) -> None:
    class Ignoring(Pair):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
            logits = self.inner.logits(idx)
            assert targets is not None
            flat = logits.flatten(0, 1), targets.flatten()
            return logits, F.cross_entropy(*flat, ignore_index=ignored)

    batch = batch_of()
    ids, labels = batch["input_ids"], batch["labels"].where(batch["labels"] >= 0, ignored)
    steps = [(ids[:1], labels[:1]), (ids[1:], labels[1:])]
    program = trainc.compile('loss model { labels = "targets" }' + SGD, Ignoring().double())
    with pytest.raises((LossMismatch, LossNotAMean)):
        program.step([(ids[1:], labels[1:]), (ids[:1], labels[:1])])
    spec = f'loss model {{ labels = "targets", ignore_index = {ignored} }}' + SGD
    found = trainc.compile(spec, Ignoring().double()).step(steps)
    want = Ignoring().double()(ids, labels)[1]
    assert found["loss"] == pytest.approx(want.item(), rel=1e-12)


# what is refused


def refused(spec: str, model: nn.Module, batch: Any) -> Exception:
    with pytest.raises((LossMismatch, WrongPick, WrongBatch)) as caught:
        trainc.compile(spec + SGD, model).step(batch)
    return caught.value


def test_refusals_say_what_to_write() -> None:
    batch = batch_of()
    inputs = {name: one for name, one in batch.items() if name != "labels"}
    text = str(refused("loss cross_entropy", OwnLoss(), (batch, batch["labels"])))
    assert "to train it write `loss model`" in text
    text = str(refused("loss cross_entropy", OwnLoss(), batch))
    assert "write `loss model`: it takes the batch whole" in text
    text = str(refused("loss model", OwnLoss(), (batch, batch["labels"])))
    assert "the inputs hold `labels`" in text
    assert "give the dict alone" in text
    text = str(refused("loss model", OwnLoss(), inputs))
    assert "no entry named as labels are; its entries are `input_ids`, `attention_mask`" in text
    text = str(refused("loss model", Pair(), (batch["input_ids"], batch["labels"])))
    assert "its `forward` takes `idx`, `targets`" in text
    text = str(
        refused(
            "loss model", gpt(layers=1, width=8, heads=1, context=8, vocabulary=WORDS), tokens(0)
        )
    )
    assert "the model computes no loss of `labels`" in text
    assert "write `loss cross_entropy`" in text

    class NoLoss(OwnLoss):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
            return Output(self.logits(input_ids))

    text = str(refused("loss model", NoLoss(), batch))
    assert "no `.loss`" in text
    assert "let `forward` return its loss" in text

    class Detached(OwnLoss):
        def forward(self, *args: Any, **given: Any) -> Any:
            return {"loss": super().forward(*args, **given).loss.detach()}

    assert "has no gradient: it was detached" in str(refused("loss model", Detached(), batch))

    class Each(OwnLoss):
        def forward(self, *args: Any, **given: Any) -> Any:
            return {"loss": super().forward(*args, **given).logits.mean((1, 2))}

    assert "has shape [6], and must be one number" in str(refused("loss model", Each(), batch))


def test_targets_that_are_the_input_are_refused_where_the_model_would_shift_them() -> None:
    batch = batch_of()
    given = ({"input_ids": batch["input_ids"]}, batch["labels"])
    text = str(refused("loss cross_entropy", OwnLoss(), given))
    assert "the targets are the input `input_ids` itself" in text
    assert "write `loss model`, or give the next tokens" in text
    assert "the input `input_ids` itself" in str(
        refused("loss cross_entropy", OwnLoss(), (batch["input_ids"], batch["labels"]))
    )
    shifted = batch["input_ids"].roll(-1, 1)
    trainc.compile("loss cross_entropy" + SGD, OwnLoss()).step((batch["input_ids"], shifted))
    plain = gpt(layers=1, width=8, heads=1, context=8, vocabulary=WORDS)  # has no loss of its own
    trainc.compile("loss cross_entropy" + SGD, plain).step((batch["input_ids"], batch["input_ids"]))


class Spans(nn.Module):
    """Two labels an example, as for questions whose answer is a span."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.ends = nn.Embedding(WORDS, 8), nn.Linear(8, 2)

    def forward(
        self,
        input_ids: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> Any:
        first, last = self.ends(self.words(input_ids)).unbind(-1)
        if start_positions is None or end_positions is None:
            return {"start": first, "end": last}
        one, two = (
            F.cross_entropy(a, b) for a, b in ((first, start_positions), (last, end_positions))
        )
        return {"loss": (one + two) / 2, "start": first, "end": last}


@each_executor
def test_several_targets_go_to_the_model_by_their_names(executor: Executor) -> None:
    from trainc.runtime.sources.collate import Collation

    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, WORDS, (6, 7), generator=generator),
        "start_positions": torch.randint(0, 7, (6,), generator=generator),
        "end_positions": torch.randint(0, 7, (6,), generator=generator),
    }
    samples = [{name: one[i] for name, one in batch.items()} for i in range(6)]
    pair = Collation(target=("start_positions", "end_positions"))(samples)
    for given in (batch, pair, (pair[0], tuple(pair[1].values()))):
        fields = ' { labels = ["start_positions", "end_positions"] }' * (given is not batch)
        model, plain = Spans().double(), Spans().double()
        spec = f"loss model{fields} noise_scale gns on all"
        trainc.compile(spec, model, executor=executor).step(given)
        plain(**batch)["loss"].backward()
        assert_close(gradients(model), gradients(plain))


def test_clauses_that_read_logits_say_where_they_are_missing() -> None:
    batch = {
        "input_ids": torch.randint(0, WORDS, (4, 7), generator=torch.Generator().manual_seed(0)),
        "start_positions": torch.tensor([0, 2, 1, 3]),
        "end_positions": torch.tensor([3, 2, 5, 6]),
    }
    for clause in ("regularize r_drop { weight = 1 }", "regularize distill { weight = 1 }"):
        with pytest.raises(WrongPick, match='write `logits = "NAME"` in the `loss` clause'):
            trainc.compile(f"loss model {clause}" + SGD, Spans()).step(batch)
    spec = 'loss model { logits = "start" } regularize r_drop { weight = 1 }' + SGD
    trainc.compile(spec, Spans()).step(batch)


class FromLabels(OwnLoss):
    """Makes the inputs of its decoder of its labels, and cannot do without."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        assert labels is not None
        before = F.pad(labels, (1, 0))[:, :-1].clamp(min=0)
        logits = self.logits((before + input_ids) % WORDS, attention_mask)
        return Output(logits, of_rule(logits, labels, "targets"))


@each_executor
def test_a_companion_is_given_the_labels_that_it_cannot_do_without(executor: Executor) -> None:
    """A copy of the model as it was is the same at first: nothing keeps them apart."""
    spec = "loss model noise_scale gns on role(norm) regularize distill { weight = 1 }" + SGD
    program = trainc.compile(spec, FromLabels().double(), executor=executor)
    first = program.step(batch_of())
    assert first["distill"] == pytest.approx(0, abs=1e-6)
    loss = FromLabels().double()(**batch_of()).loss
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert program.step(batch_of())["distill"] > 1e-6


RUN = """
model "{module}:made"
data "{module}:samples" {{ batch = 8 samples, micro = 3 samples }}
loss model{fields}
optimizer sgd {{ lr = 0.1 }}
noise_scale gns on all
run {{ length = {length} steps, seed = 2, eval = 2 steps, checkpoint = 2 steps }}
"""
SAMPLES = """
import torch
from tests.own_losses import OwnLoss, batch_of
def made(): return {model}
class Rows(torch.utils.data.Dataset):
    def __init__(self, seed): self.rows = batch_of(seed, 24)
    def __len__(self): return 24
    def __getitem__(self, i): return {{name: one[i] for name, one in self.rows.items()}}
def samples(): return Rows(0), Rows(1)
"""


def test_a_run_with_a_collator_s_dicts_is_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.compiler.driver.train import train

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_loss_rows.py").write_text(SAMPLES.format(model="OwnLoss()"))
    text = RUN.format(module="own_loss_rows", fields="", length="{length}")
    spec = tmp_path / "run.train"
    spec.write_text(text.replace("{length}", "4").replace("micro = 3", "micro = 4"))
    straight = train(spec, tmp_path / "a", quiet=True)
    spec.write_text(text.replace("{length}", "2").replace("micro = 3", "micro = 4"))
    train(spec, tmp_path / "b", quiet=True)
    spec.write_text(text.replace("{length}", "4").replace("micro = 3", "micro = 4"))
    resumed = train(spec, tmp_path / "b", quiet=True, resume=True, accept=True)
    assert (resumed.loss, resumed.eval_loss) == (straight.loss, straight.eval_loss)


def test_errors_of_a_run_stand_at_the_clause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.compiler.driver.train import train

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_loss_wrong.py").write_text(SAMPLES.format(model="OwnLoss()"))
    spec = tmp_path / "run.train"
    for fields, place, message in (
        (" { counted = targets }", ":4:24", "`counted = targets` does not fit"),
        (' { output = "mlm" }', ":4:23", '`output = "mlm"`'),
    ):
        text = RUN.format(module="own_loss_wrong", fields=fields, length=2)
        spec.write_text(text.replace("micro = 3", "micro = 4"))
        with pytest.raises(trainc.SpecError, match=message) as caught:
            train(spec, tmp_path / "out", quiet=True, overwrite=True)
        assert f"run.train{place}" in str(caught.value)
