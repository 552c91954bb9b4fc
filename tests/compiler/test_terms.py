"""Loss terms of clauses: their own numbers, their names, and passes that a loop by hand makes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainc
from trainc.compiler.driver.site_diagnostics import clause_diagnostic
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.action import ClauseFailed, failures_of

BASE = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps, seed = 2 } "
PACE = BASE + "regularize pace on type(Linear) { sigma = 0.5, weight = 0.7 }"


class Numbers(Construct):
    """Adds `factor` and `anchor` times the mean square of the logits, both named in the method by plain words."""

    kind: ClassVar = "regularize"
    name: ClassVar = "numbers"
    effects: ClassVar = (Effect("forward", "read logits", ("forward",), ("loss",)),)
    factor: float
    anchor: float

    def lower(self, to: Lowering) -> None:
        to.term(
            lambda f: (f.tensors["key"] + f.tensors["anchor"]) * f.logits.square().mean(),
            over="examples",
            scalars={"key": lambda clock: self.factor},
            tensors={"anchor": torch.tensor(self.anchor, dtype=torch.float64)},
        )


class Twice(Construct):
    """Adds two terms without names."""

    kind: ClassVar = "regularize"
    name: ClassVar = "twice"
    effects: ClassVar = (Effect("forward", "read logits", ("forward",), ("loss",)),)

    def lower(self, to: Lowering) -> None:
        for _ in range(2):
            to.term(lambda f: f.logits.square().mean(), over="examples")


class NotOne(Construct):
    """Adds a number of each example."""

    kind: ClassVar = "regularize"
    name: ClassVar = "not_one"
    effects: ClassVar = (Effect("forward", "read logits", ("forward",), ("loss",)),)

    def lower(self, to: Lowering) -> None:
        to.term(lambda f: f.logits.square().mean(1), over="examples")


class Model(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mid, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.reentrant = reentrant

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.mid(h))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        if self.reentrant is not None:
            found: Tensor = self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))
            return found
        logits: Tensor = self.head(self.block(h))
        return logits


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=made, dtype=torch.float64)
    return x, torch.randint(6, (examples,), generator=made)


def spec(*clauses: Clause) -> Spec:
    base = trainc.check(BASE).spec
    assert base is not None
    return Spec((*base.clauses, *clauses))


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_clauses_have_numbers_and_tensors_of_their_own(executor: Any) -> None:
    one = Clause(Numbers(factor=1.0, anchor=0.5), label="one")
    two = Clause(Numbers(factor=3.0, anchor=2.0), label="two")
    metrics = trainc.compile(spec(one, two), Model().double(), executor=executor).step(batch(0))
    square = float(Model().double()(batch(0)[0]).square().mean().detach())
    found = metrics["one"], metrics["two"]
    assert found == pytest.approx((1.5 * square, 5 * square), rel=1e-12)


def test_example_fractions_of_a_term_over_examples_sum_to_one() -> None:
    program = trainc.compile(spec(Clause(Numbers(factor=1.0, anchor=0.5))), Model().double())
    program.loss(batch(0), 0.5, 0.5).backward()
    program.loss(batch(1), 0.5, 0.25).backward()
    with pytest.raises(ValueError, match=r"example fractions .* sum to 0\.75, not 1"):
        program.update()


def test_two_terms_of_one_name_are_an_error() -> None:
    with pytest.raises(SpecError, match="two terms of the loss would have the metric `twice`"):
        trainc.compile(spec(Clause(Twice())), Model())


@pytest.mark.parametrize("label", ["data_loss", "skipped", "lr_min", "lr_max", "gradient_norm"])
def test_a_clause_is_not_called_as_what_every_step_reports(label: str) -> None:
    (error,) = trainc.check(f"{BASE} regularize r_drop as {label} {{ weight = 1 }}").errors
    assert error.rule == "reserved-name"


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_predictions_need_one_target_each(executor: Any) -> None:
    clause = "observe calibration { of = training }"
    program = trainc.compile(BASE + clause, Model().double(), executor=executor)
    x, y = batch(0)
    probabilities = torch.nn.functional.one_hot(y, 6).double()
    with pytest.raises(
        ClauseFailed, match=r"needs class indices, .* probabilities of classes"
    ) as it:
        program.step((x, probabilities))
    assert it.value.clause == "calibration"


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_term_that_fails_in_a_step_says_at_which_clause(executor: Any) -> None:
    program = trainc.compile(
        spec(Clause(NotOne(), label="wide")), Model().double(), executor=executor
    )
    with pytest.raises(ClauseFailed, match=r"0-d tensor, but returned shape \[6\]") as it:
        program.step(batch(0))
    assert it.value.clause == "wide"
    with pytest.raises(ClauseFailed, match="why") as it, failures_of("wide second stage"):
        raise ValueError("why")
    assert it.value.clause == "wide"
    text = BASE + "observe calibration { of = training }"
    checked = trainc.check(text).unwrap()
    found = clause_diagnostic(ClauseFailed("calibration", "why"), checked)
    assert found.span is not None
    assert (found.rule, found.span.text) == ("clause-failed", text.removeprefix(BASE))


def test_predictions_of_an_evaluation_need_one_target_each() -> None:
    program = trainc.compile(BASE + "observe calibration", Model().double())
    x, y = batch(0)
    with pytest.raises(ClauseFailed, match="needs class indices"):
        program.evaluate(x, torch.nn.functional.one_hot(y, 6).double())


def weights(program: Program) -> Tensor:
    return torch.cat([p.detach().flatten() for p in program.module.parameters()])


@pytest.mark.parametrize("extra", ["", " noise_scale gns on type(Linear)"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_repeat_the_noise_of_their_own_micro_batch(reentrant: bool, extra: str) -> None:
    """Two micro-batches run before the backward pass of either."""
    wanted = trainc.compile(PACE + extra, Model().double(), executor="module")
    program = trainc.compile(PACE + extra, Model(reentrant).double(), executor="module")
    for step in range(3):
        parts = [batch(step, 2), batch(step + 9, 4)]
        metrics = wanted.step(parts)
        losses = [
            program.loss(part, weight) for part, weight in zip(parts, (1 / 3, 2 / 3), strict=True)
        ]
        sum(losses, start=torch.zeros(())).backward()
        assert program.update() == pytest.approx(metrics, rel=1e-12, nan_ok=True)
    torch.testing.assert_close(weights(program), weights(wanted), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("counted", [1, 0])
def test_a_term_over_examples_is_reported_whole_where_one_micro_batch_has_all_targets(
    executor: Any, counted: int
) -> None:
    base = trainc.check(BASE.replace("seed = 2", "seed = 2, on_nan = skip")).unwrap()
    given = Spec((*base.clauses, Clause(Numbers(factor=1.0, anchor=0.5))))
    wanted, program = (trainc.compile(given, Model().double(), executor=executor) for _ in range(2))
    x, y = batch(0)
    y[counted:] = -100
    metrics, found = (
        p.step(some) for p, some in ((wanted, (x, y)), (program, [(x[:4], y[:4]), (x[4:], y[4:])]))
    )
    assert found == pytest.approx(metrics, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("by", ["step", "loop", "sam", "measured", "measured loop"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_terms_over_examples_have_those_without_a_target_that_counts(
    executor: Any, by: str
) -> None:
    clauses = [Clause(Numbers(factor=1.0, anchor=0.5))]
    gns = "noise_scale gns on type(Linear) { smooth = 2 steps }"
    more = {"sam": "perturb sam { rho = 0.1 }", "measured": gns, "measured loop": gns}
    text = BASE + more.get(by, "")
    base = trainc.check(text).spec
    assert base is not None
    given = Spec((*base.clauses, *clauses))
    wanted, program = (trainc.compile(given, Model().double(), executor=executor) for _ in range(2))
    for seed in range(3):
        x, y = batch(seed)
        y[2:4] = -100
        parts = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]
        metrics = wanted.step((x, y))
        if "loop" in by:
            for part, weight in zip(parts, (0.5, 0.0, 0.5), strict=True):
                program.loss(part, weight, 1 / 3).backward()
        found = program.update() if "loop" in by else program.step(parts)
        assert found == pytest.approx(metrics, rel=1e-12, nan_ok=True)
    torch.testing.assert_close(weights(program), weights(wanted), rtol=1e-12, atol=1e-14)


def test_a_model_without_logits_is_no_bug_of_the_compiler() -> None:
    class Named(Model):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x)}

    clause = BASE + "regularize distill { weight = 1 }"
    program = trainc.compile(clause, Named().double(), executor="graph")
    with pytest.raises(TypeError, match="the model returned a dict with `scores`"):
        program.step(batch(0))


def test_a_loop_inside_autocast_uses_the_weights_of_each_step() -> None:
    losses = []
    for inside in (False, True):
        program = trainc.compile(PACE, Model(), executor="module")
        with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
            for seed in range(3):
                x, y = batch(seed)
                with torch.autocast("cpu", torch.bfloat16):
                    metrics = program.step((x.float(), y))
        losses.append(metrics)
    assert losses[0] == losses[1]
