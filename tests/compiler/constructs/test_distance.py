"""Distance against its definition, walks whose growth is known, and a resumed run."""

import copy
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import trainc
from tests.compiler.observed_weights import machine as machine_of
from tests.compiler.observed_weights import net, noise, update, weights
from trainc.compiler.constructs.observe.weights._copies import Copies
from trainc.compiler.constructs.observe.weights.distance import Distance
from trainc.compiler.driver.train import train
from trainc.runtime.report.run_records import RecordedClause, RunRecords
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.machine import StepMachine


def machine(net: nn.Module, every: int | None = None, start: int | None = None) -> StepMachine:
    """Return the machine of a distance of all parameters."""
    return machine_of(net, Distance(), "d", every, start)


def test_the_distance_is_from_the_weights_before_the_first_update() -> None:
    m = machine(net(), every=2)
    start = weights(m)
    steps = [update(m, noise) for _ in range(3)]
    assert ["d" in step.metrics for step in steps] == [True, False, True]
    assert steps[-1].signals["d"] == pytest.approx(Distance.reference(start, weights(m)), rel=1e-6)
    for name, v, w in zip(m.parameters, start, weights(m), strict=True):
        found = steps[-1].series["d"][name]
        assert found == pytest.approx(Distance.reference([v], [w]), rel=1e-5)


def test_the_start_is_where_the_clause_begins_and_time_counts_from_there() -> None:
    m = machine(nn.Linear(1, 1, bias=False).double(), start=5)
    for t in range(1, 30):
        step = update(m, lambda w, t=t: math.log(t - 5) - math.log(max(1, t - 6)) if t > 6 else 1.0)
    # After 5 updates the clause begins, at update 6 the distance is 1, and then it grows as 1 + ln(t - 5).
    assert step.metrics["d"] == pytest.approx(1 + math.log(24))
    assert step.metrics["d.log"] == pytest.approx(1, abs=1e-12)


def test_steps_of_independent_directions_grow_as_the_root_of_time() -> None:
    """The k-th of t orthogonal unit steps leaves |w - w0| at sqrt(k)."""
    layer = nn.Linear(100, 1, bias=False).double()
    m = machine(layer)
    for t in range(100):
        step = update(m, lambda w, t=t: nn.functional.one_hot(torch.tensor([t]), 100).double())
        assert step.metrics["d"] == pytest.approx(math.sqrt(t + 1))
    assert step.metrics["d.sqrt"] == step.metrics["d.fit"] == pytest.approx(1, abs=1e-12)
    assert step.metrics["d.log"] < 0.95
    assert step.metrics["d.slope"] == pytest.approx(1)
    assert "best fit sqrt" in (m.actions[-1].summary() or "")


def test_observing_changes_no_weight_and_no_random_number() -> None:
    results = []
    for observed in (False, True):
        m = machine(net()) if observed else StepMachine([], Clock(), dict(net().named_parameters()))
        torch.manual_seed(1)
        for _ in range(4):
            update(m, noise)
        results.append(weights(m))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_resuming_is_bit_equal() -> None:
    def continued(m: StepMachine) -> list[dict[str, float]]:
        torch.manual_seed(5)
        return [update(m, noise).metrics for _ in range(6)]

    m = machine(net(), every=2, start=2)
    for _ in range(7):
        update(m, noise)
    saved, values = copy.deepcopy(m.state_dict()), weights(m)
    expected = continued(m)
    fresh = machine(net(1), every=2, start=2)
    fresh.load_state_dict(saved)
    with torch.no_grad():
        for parameter, value in zip(fresh.parameters.values(), values, strict=True):
            parameter.copy_(value)
    assert continued(fresh) == expected
    assert fresh.actions[-1].summary() == m.actions[-1].summary()


def test_the_copy_is_counted() -> None:
    size = sum(p.numel() * p.element_size() for p in net().parameters())
    held = [action.memory() for action in machine(net()).actions if isinstance(action, Copies)]
    assert held == [size]
    plan = trainc.plan(
        "loss mse optimizer sgd { lr = 0.1 } observe distance as far every 1 steps", net()
    )
    assert {row["what"]: row["bytes"] for row in plan.memory}["far.start"] == size


def test_weights_that_are_not_finite_are_named_and_spoil_no_fit() -> None:
    m = machine(net())
    for _ in range(4):
        update(m, noise)
    step = update(m, lambda w: math.nan if w.dim() == 2 else 0.0)
    assert math.isnan(step.metrics["d"])
    assert "`0.weight` and 1 more" in step.notes[0]
    assert math.isfinite(step.metrics["d.fit"])


def test_a_small_change_of_16_bits_is_measured_in_32() -> None:
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    m = machine(layer)
    start = weights(m)
    step = update(m, lambda w: w * 0.01)
    assert step.metrics["d"] == pytest.approx(Distance.reference(start, weights(m)), rel=1e-6)


def test_a_rule_acts_on_the_distance(tmp_path: Path) -> None:
    spec = tmp_path / "far.train"
    spec.write_text(
        'model "examples.models:teacher_student"\n'
        'data "examples.data:teacher" { batch = 4 samples, samples = 64 }\n'
        "loss mse\nrun { length = 30 steps, seed = 3 }\noptimizer sgd { lr = 0.1 }\n"
        'observe distance every 1 steps\nwhen distance > 0.1 { warn "far", stop }\n'
    )
    train(spec, tmp_path / "run", quiet=True)
    assert '"far"' in (tmp_path / "run" / "events.jsonl").read_text()


def test_the_table_and_the_picture_count_time_from_the_start_of_the_clause(tmp_path: Path) -> None:
    records = [{"step": t, "d": 1 + 2 * math.log(t - 4)} for t in range(5, 30)]
    (table,) = Distance().tables("d", records)
    assert [row[:2] for row in table.rows if row[0] == "log"] == [("log", "1.0000")]
    run = RunRecords("run", [{"loss": 1.0, **one} for one in records], "#000000")
    clause = RecordedClause(run, "d", Distance())
    (panel,) = Distance.panels([clause], [run])
    axes = Figure().add_subplot()
    panel.draw(axes)
    measured, log, _ = axes.lines
    drawn, seen = (torch.as_tensor(line.get_ydata()) for line in (log, measured))
    torch.testing.assert_close(drawn, seen)
    assert log.get_label() == "log, r2 1.0000"


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the distance after three training steps, by the program and by definition."""
    model = net().double()
    start = [p.detach().clone() for p in model.parameters()]
    program = trainc.compile(
        "loss mse optimizer sgd { lr = 0.1 } observe distance on all every 1 steps", model
    )
    batch = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        program.step(batch)
    want = Distance.reference(start, [p.detach() for p in model.parameters()])
    return (
        {"distance": torch.tensor(program.signals["distance"], dtype=torch.float64)},
        {"distance": torch.tensor(want, dtype=torch.float64)},
    )
