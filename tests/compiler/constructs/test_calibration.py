"""Calibration: the published numbers, brute force by bin, and what a run and a loop of one's own report."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.observe._temperature import slopes, temperature
from trainc.compiler.constructs.observe.calibration import Calibration, Predictions
from trainc.compiler.method.term import Forward
from trainc.runtime.data.batch import Batch
from trainc.runtime.report.run_records import RecordedClause, RunRecords

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


def measures(bins: int, made: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Return what is measured of batches by definition."""
    logs = torch.cat([made(x).log_softmax(-1)[y != -100].detach() for x, y in batches])
    targets = torch.cat([y[y != -100] for _, y in batches])
    found = Calibration(bins=bins).reference(*predictions(made, batches))
    return found | {"nll": float(nn.functional.nll_loss(logs, targets))}


def test_bins_of_equal_counts_give_the_published_numbers() -> None:
    found = Calibration(bins=4).reference(*published())
    ece, rms = ROW["ece_equal_mass4"]
    assert (found["ece"], found["rms"]) == pytest.approx((ece, rms), rel=1e-12)
    assert found["brier"] == pytest.approx(ROW["brier"], rel=1e-12)


@pytest.mark.parametrize(
    ("bins", "closed", "name"),
    [
        (10, "right", "ece10_left_open_guo"),
        (15, "right", "ece15_left_open"),
        (10, "left", "ece10_left_closed"),
    ],
)
def test_bins_of_equal_widths_give_the_published_numbers(bins: int, closed: Any, name: str) -> None:
    rule = Calibration(bins=bins, binning="equal_width", closed=closed)
    found = rule.reference(*published())
    wanted = pytest.approx(ROW[name], rel=1e-12)
    assert [found["ece"], found["mce"], found["rms"]] == wanted


def test_an_edge_belongs_to_the_bin_below_it_or_above_it() -> None:
    for i in range(1, 20):
        one = torch.tensor([i / 20], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for closed, bin_of_it in (("right", i - 1), ("left", i)):
            rule = Calibration(bins=20, binning="equal_width", closed=closed)  # type: ignore[arg-type]
            assert int(rule.bins_of(*one)[0].argmax()) == bin_of_it
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for closed in ("right", "left"):
        rule = Calibration(bins=4, binning="equal_width", closed=closed)  # type: ignore[arg-type]
        assert rule.bins_of(ends, ends)[0].tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="add `binning = equal_width`"):
        Calibration(closed="left")


def two_classes() -> tuple[Tensor, Tensor]:
    """Return logits and targets of two classes, the second with the published confidences."""
    confidence, right = published()
    odds = torch.logit(confidence, eps=1e-15)
    return torch.stack([torch.zeros_like(odds), odds], -1), right.long()


def test_nll_is_the_published_one_and_that_of_torch() -> None:
    logits, targets = two_classes()
    observer = Predictions("calibration", Calibration())
    observer.see(Forward(logits, targets, None, 1, {}, {}))
    assert observer.found()["nll"] == pytest.approx(ROW["nll"], abs=1e-12)
    wanted = nn.functional.cross_entropy(logits, targets)
    assert observer.found()["nll"] == pytest.approx(float(wanted), rel=1e-12)


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature of the smallest cross-entropy, by bisection of its slope in 1 / T."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        beta = torch.tensor(math.sqrt(low * high), dtype=torch.float64, requires_grad=True)
        nn.functional.cross_entropy(logits * beta, targets).backward()
        assert beta.grad is not None
        low, high = (low, float(beta.detach())) if beta.grad > 0 else (float(beta.detach()), high)
    return 1 / low


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_temperature_is_that_of_the_smallest_cross_entropy(scale: float) -> None:
    made = torch.Generator().manual_seed(4)
    logits = scale * torch.randn(300, 6, generator=made, dtype=torch.float64)
    drawn = torch.rand(300, generator=made) < 0.3
    targets = torch.where(drawn, logits.argmax(-1), torch.randint(6, (300,), generator=made))
    found = temperature(slopes(logits, targets))
    assert found == pytest.approx(best_temperature(logits, targets), rel=1e-4)
    masked = torch.cat([logits, torch.full((300, 1), -torch.inf, dtype=torch.float64)], -1)
    assert temperature(slopes(masked, targets)) == pytest.approx(found, rel=1e-9)
    halves = slopes(logits[:120], targets[:120]) + slopes(logits[120:], targets[120:])
    assert temperature(halves) == pytest.approx(found, rel=1e-9)


def test_there_is_no_temperature_where_all_are_right_or_the_best_is_none() -> None:
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=made, dtype=torch.float64)
    assert temperature(slopes(logits, logits.argmax(-1))) is None
    assert temperature(slopes(logits, logits.argmin(-1))) is None


@pytest.mark.parametrize("draw", range(8))
def test_a_class_that_cannot_be_has_a_temperature_only_where_it_is_no_target(draw: int) -> None:
    made = torch.Generator().manual_seed(draw)
    logits = torch.randn(50, 4, generator=made, dtype=torch.float64)
    best, worst = logits.argmax(-1), logits.argmin(-1)
    targets = torch.where(torch.arange(50) < 40, best, worst)  # mostly right: the best T is above 0
    logits[3, (best[3] + 1) % 4] = -torch.inf  # no temperature gives this class a probability
    assert temperature(slopes(logits, targets)) is not None
    targets[3] = (best[3] + 1) % 4
    assert temperature(slopes(logits, targets)) is None


def test_the_temperature_is_measured_where_it_is_asked_for() -> None:
    made = model()
    program = trainc.compile(SPEC + " { of = training, temperature = true }", made)
    x, y = batch(0)
    logits = made(x).detach()[y != -100]
    found = program.step((x, y))["calibration.temperature"]
    assert found == pytest.approx(best_temperature(logits, y[y != -100]), rel=1e-4)
    assert Calibration().unmeasured_reason("temperature") is not None


def test_the_picture_is_of_the_last_evaluation() -> None:
    program = trainc.compile(SPEC + " { bins = 6 }", model())
    records = []
    for seed in (1, 2):
        program.evaluate(*batch(seed))
        records.append({"step": seed, "loss": 1.0, **program.evaluation_metrics()})
    run = RunRecords("run", records, "#000000")
    clause = RecordedClause(run, "calibration", Calibration(bins=6))
    panel = [*Calibration.panels([clause], [run])][-1]
    axes = Figure().add_subplot()
    panel.draw(axes)
    sizes, gaps, sums = Calibration(bins=6).bins_of(*predictions(model(), [batch(2)]))
    drawn = axes.lines[1]
    torch.testing.assert_close(torch.as_tensor(drawn.get_xdata()), sums / sizes)
    torch.testing.assert_close(torch.as_tensor(drawn.get_ydata()), (sums + gaps) / sizes)


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
    wanted = measures(6, program.module.eval(), batches)
    bins = {name: found.pop(name) for name in [*found] if ".bin" in name}
    assert found == pytest.approx({f"calibration.{n}": v for n, v in wanted.items()}, rel=1e-12)
    assert sum(v for n, v in bins.items() if n.endswith(".size")) == 12 * 3 + 5 * 3 - 6
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
        wanted = measures(5, program.module, parts)
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
    wanted = measures(4, model(), [batch(0)])
    metrics = program.step(batch(0))
    named = {n: torch.tensor(v, dtype=torch.float64) for n, v in wanted.items()}
    found = {n: torch.tensor(metrics[f"calibration.{n}"], dtype=torch.float64) for n in wanted}
    return found, named
