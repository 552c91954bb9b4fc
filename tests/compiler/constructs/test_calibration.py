"""Calibration: the published numbers, brute force by bin, and what a run and a loop of one's own report."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.observe.calibration import Calibration
from trainc.runtime.data.batch import Batch

REFERENCE = json.loads((Path(__file__).parents[2] / "reference/other_methods.json").read_text())
ROW = REFERENCE["calibration"]
SPEC = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 20 steps, seed = 1 } observe calibration"


def published() -> tuple[Tensor, Tensor]:
    """Return the twelve predictions that the reference numbers are of."""
    confidence, right = (
        torch.tensor(ROW[name], dtype=torch.float64) for name in ("confidence", "correct")
    )
    return confidence, right


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 5)).double()


def batch(seed: int, examples: int = 12) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(examples, 3, 4, generator=made, dtype=torch.float64)
    targets = torch.randint(5, (examples, 3), generator=made)
    targets[0, 1:], targets[4, 0] = -100, -100
    return x, targets


def by_bins(confidence: list[float], right: list[float], bins: int) -> tuple[float, float]:
    """Return ECE and RMS over bins of equal counts, bin by bin in Python."""
    rows = sorted(zip(confidence, right, strict=True))
    count, ece, squares = len(rows), 0.0, 0.0
    for number in range(bins):
        inside = [row for i, row in enumerate(rows) if i * bins // count == number]
        if inside:
            gap = sum(r for _, r in inside) / len(inside) - sum(c for c, _ in inside) / len(inside)
            ece += len(inside) / count * abs(gap)
            squares += len(inside) / count * gap**2
    return ece, math.sqrt(squares)


def predictions(made: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return confidences and which are right of the targets that count."""
    rows = []
    for x, y in batches:
        p = made(x).softmax(-1)[y != -100]
        rows.append((p.max(-1).values.detach(), (p.argmax(-1) == y[y != -100]).double()))
    return torch.cat([c for c, _ in rows]), torch.cat([r for _, r in rows])


def test_bins_of_equal_counts_give_the_published_numbers() -> None:
    found = Calibration(bins=4).reference(*published())
    ece, rms = ROW["ece_equal_mass4"]
    assert (found["ece"], found["rms"]) == pytest.approx((ece, rms), rel=1e-12)
    assert found["brier"] == pytest.approx(ROW["brier"], rel=1e-12)


@pytest.mark.parametrize("bins", [10, 15])
def test_bins_of_equal_widths_give_the_published_numbers(bins: int) -> None:
    rule = Calibration(bins=bins, binning="equal_width")
    ece, _, rms = ROW["ece10_left_open_guo" if bins == 10 else "ece15_left_open"]
    found = rule.reference(*published())
    assert (found["ece"], found["rms"]) == pytest.approx((ece, rms), rel=1e-12)


@pytest.mark.parametrize("bins", [1, 3, 7, 50])
def test_bins_that_do_not_divide_differ_by_one_at_most(bins: int) -> None:
    made = torch.Generator().manual_seed(bins)
    confidence = torch.rand(41, generator=made, dtype=torch.float64)
    right = (torch.rand(41, generator=made) < 0.6).double()
    found = Calibration(bins=bins).reference(confidence, right)
    want = by_bins(confidence.tolist(), right.tolist(), bins)
    assert (found["ece"], found["rms"]) == pytest.approx(want, rel=1e-12)


def test_the_order_of_equal_confidences_does_not_matter() -> None:
    confidence = torch.tensor([0.5] * 6 + [0.9] * 2, dtype=torch.float64)
    right = torch.tensor([1.0, 1, 0, 0, 0, 1, 1, 0], dtype=torch.float64)
    found = [
        Calibration(bins=4).reference(confidence[order], right[order])
        for order in (torch.arange(8), torch.arange(7, -1, -1), torch.randperm(8))
    ]
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])
    assert found[0]["ece"] == pytest.approx((0.0 * 6 + 0.4 * 2) / 8)


def test_an_evaluation_is_measured_over_all_its_batches() -> None:
    program = trainc.compile(SPEC + " { bins = 6 }", model(0.4))
    batches = [batch(1), batch(2, 5)]
    for inputs, targets in batches:
        program.evaluate(inputs, targets)
    found = program.evaluation_metrics()
    wanted = Calibration(bins=6).reference(*predictions(program.module.eval(), batches))
    assert found == pytest.approx({f"calibration.{n}": v for n, v in wanted.items()}, rel=1e-12)
    assert program.signals["calibration.ece"] == found["calibration.ece"]
    assert program.evaluation_metrics() == {}
    program.module.train()
    program.evaluate(*batch(1))
    measured = {"loss", "gradient_norm", "batch", "lr_min", "lr_max"}
    assert set(program.step(batch(3))) == measured
    program.evaluate(*batch(2, 5))
    again = Calibration(bins=6).reference(*predictions(program.module.eval(), [batch(2, 5)]))
    assert program.evaluation_metrics()["calibration.ece"] == pytest.approx(again["ece"], rel=1e-12)


@pytest.mark.parametrize("sizes", [(), (1, 7, 4)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_training_steps_are_measured_at_the_times_of_the_clause(executor: Any, sizes: Any) -> None:
    spec = SPEC + " from 1 step every 2 steps { of = training, bins = 5 }"
    program = trainc.compile(spec, model(), executor=executor)
    plain = trainc.compile(SPEC.replace(" observe calibration", ""), model(), executor=executor)
    for step in range(4):
        parts = divided(batch(step), sizes) if sizes else [batch(step)]
        wanted = Calibration(bins=5).reference(*predictions(program.module, parts))
        metrics, others = program.step(parts), plain.step(parts)
        assert {n: v for n, v in metrics.items() if "calibration" not in n} == others
        if step in (1, 3):
            own = {n: v for n, v in metrics.items() if n.startswith("calibration")}
            named = {f"calibration.{n}": v for n, v in wanted.items()}
            assert own == pytest.approx(named, rel=1e-9)
        else:
            assert metrics == others
    for got, want in zip(program.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    program = trainc.compile(SPEC + " { of = training }", model())
    x, y = batch(0)
    with pytest.raises(ValueError, match="is the class"):
        program.step([(x[:6], y[:6]), (x[6:], y[6:] + 99)])
    found = program.step(batch(1))["calibration.right"]
    _, right = predictions(model(), [batch(1)])
    assert found == pytest.approx(float(right.mean()), rel=1e-12)


def test_every_is_refused_for_evaluations_and_a_loss_without_classes_always() -> None:
    with pytest.raises(trainc.SpecError, match="the period of evaluations is `eval` in `run`"):
        trainc.plan(SPEC + " every 2 steps", model())
    with pytest.raises(trainc.SpecError, match="the targets of `loss mse` are no classes"):
        trainc.plan("loss mse optimizer sgd { lr = 0.1 } observe calibration", model())


def test_the_summary_survives_a_resume() -> None:
    program = trainc.compile(SPEC, model())
    program.step(batch(0))
    program.evaluate(*batch(1))
    program.evaluation_metrics()
    other = trainc.compile(SPEC, model())
    other.load_state_dict(program.state_dict())
    (line,) = (text for text in program.summary() if text.startswith("calibration:"))
    assert line in other.summary()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the measures of one step, by the graph and by definition."""
    program = trainc.compile(SPEC + " { of = training, bins = 4 }", model(), executor="graph")
    wanted = Calibration(bins=4).reference(*predictions(model(), [batch(0)]))
    metrics = program.step(batch(0))
    named = {n: torch.tensor(v, dtype=torch.float64) for n, v in wanted.items()}
    found = {n: torch.tensor(metrics[f"calibration.{n}"], dtype=torch.float64) for n in wanted}
    return found, named
