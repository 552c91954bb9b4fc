"""The spectrum of a probe against published numbers, sums by hand, and what observing must not change."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.data import curve_points
from tests.conformance import Setup
from trainc.compiler.constructs.observe._spectrum import spearman
from trainc.compiler.constructs.observe.frequency import Frequency
from trainc.compiler.driver.train import train
from trainc.dsl.reading.construct import ImportPath

PROBE = 'probe = "examples.data:curve_points"'
BASE = "loss mse optimizer adamw { lr = 1e-2 } run { length = 40 steps } "
HERE = "tests.compiler.constructs.test_frequency"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))


def construct(**fields: Any) -> Frequency:
    return Frequency(probe=ImportPath("examples.data", "curve_points"), **fields)


def plane() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(30, 3, generator=made) * torch.tensor([3.0, 1.0, 0.5])
    return x, torch.stack([x[:, 0].sin(), x.prod(1)], 1)


def classes() -> tuple[Tensor, Tensor]:
    x, _ = plane()
    return x, (x[:, 0] > 0).long()


def uneven() -> tuple[Tensor, Tensor]:
    x, y = curve_points()
    return x**3, y


def token_ids() -> tuple[Tensor, Tensor]:
    return torch.arange(8)[:, None], torch.zeros(8, 1)


def nothing() -> tuple[Tensor, Tensor]:
    x, y = curve_points()
    return x, 0 * y


def two_outputs() -> tuple[Tensor, Tensor]:
    x, y = curve_points()
    return x, torch.cat([y, -y], 1)


def broken() -> tuple[Tensor, Tensor]:
    raise KeyError("gone")


def test_the_published_example() -> None:
    """Errors .025, .260 and .837 at the bins 2, 5 and 8."""
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    y = x.sin() + 2 * (3 * x).sin() + 3 * (5 * x).sin()
    output = x.sin() + 1.5 * (3 * x).sin() + 0.5 * (5 * x).sin()
    made = construct(compare="magnitudes")
    probe = made.probe_of(x, y)
    shown = {
        "k = 2": 0.025423265201160925,
        "k = 5": 0.2597549067488975,
        "k = 8": 0.8373827927695034,
    }
    found = made.reference(x, y, output)
    assert {name: found[name] for name in shown} == pytest.approx(shown, rel=1e-12)
    sizes = dict(zip(probe.names, probe.amplitudes, strict=True))
    assert sizes["k = 8"] == pytest.approx(148.0481905631654, rel=1e-12)


@pytest.mark.parametrize("compare", ["coefficients", "magnitudes"])
def test_grid_is_the_sum_of_waves(compare: str) -> None:
    x, y = curve_points()
    output = net()(x).detach()
    found = construct(compare=compare).reference(x, y, output)
    assert [*found] == ["k = 1", "k = 3", "k = 5"]
    for k, error in zip((1, 3, 5), found.values(), strict=True):
        wave = torch.polar(
            torch.ones(64).double(), -2 * math.pi * k * torch.arange(64).double() / 64
        )
        got, want = ((wave * one[:, 0].double()).sum() for one in (output, y))
        gap = abs(got - want) if compare == "coefficients" else abs(abs(got) - abs(want))
        assert error == pytest.approx(float(gap / (1e-5 + abs(want))), rel=1e-9)


def test_projection_is_the_sum_of_waves_along_the_first_component() -> None:
    x, y = plane()
    output = torch.stack([y[:, 0] * 0.5, y[:, 1] + 0.1], 1)
    found = construct(method="projection", highest=4).reference(x, y, output)
    rows = x.double() - x.double().mean(0)
    first = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    p = rows @ first * first[first.abs().argmax()].sign()
    p = (p - p.min()) / (p.max() - p.min())
    for name, error in found.items():
        k = int(name.removeprefix("k = "))
        wave = torch.polar(torch.ones_like(p), -2 * math.pi * k * p)[:, None] / 30
        got, want = (torch.stack([(wave * one.double()).sum(0)]) for one in (output, y))
        gap = (got - want).abs().square().sum().sqrt()
        assert error == pytest.approx(
            float(gap / (1e-5 + want.abs().square().sum().sqrt())), rel=1e-9
        )


def test_filter_is_the_mean_over_neighbours_sample_by_sample() -> None:
    x, y = plane()
    output = 0.5 * y + 0.1
    found = construct(method="filter", width=0.7).reference(x, y, output)
    low = {}
    for name, values in (("y", y.double()), ("h", output.double())):
        rows = []
        for one in x.double():
            weights = (-(x.double() - one).square().sum(1) / (2 * 0.7**2)).exp()
            rows.append((weights[:, None] * values).sum(0) / weights.sum())
        low[name] = torch.stack(rows)
    high = {"y": y.double() - low["y"], "h": output.double() - low["h"]}
    wanted = [float((part["h"] - part["y"]).norm() / part["y"].norm()) for part in (low, high)]
    assert [*found.values()] == pytest.approx(wanted, rel=1e-9)


def test_classes_are_compared_with_probabilities() -> None:
    x, y = classes()
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(2))
    wanted = torch.nn.functional.one_hot(y, 3).float()
    found = construct(method="projection").reference(x, y, logits)
    assert found == pytest.approx(
        construct(method="projection").reference(x, wanted, logits.softmax(-1)), rel=1e-5
    )


def test_spearman_counts_ties_with_their_mean_rank() -> None:
    assert spearman([0, 1, 2], [5, 7, math.inf]) == 1
    assert spearman([0, 1, 2], [math.inf, 7, 5]) == -1
    assert spearman([0, 1, 2], [3, 3, 3]) == 0
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(5 * 4.5)
    assert spearman([0, 1, 2, 3], [1, 2, 2, 9]) == pytest.approx(4.5 / math.sqrt(22.5))


def test_first_times_are_kept_and_the_order_follows() -> None:
    program = trainc.compile(
        BASE + f"observe frequency every 1 steps {{ {PROBE}, threshold = 0.6 }}", net()
    )
    made = construct()
    found: dict[str, int] = {}
    for step in range(1, 121):
        program.step(curve_points())
        x, y = curve_points()
        errors = made.reference(x, y, program.module(x).detach())
        found |= {n: step for n, error in errors.items() if error < 0.6 and n not in found}
    (action,) = (one for one in program.execution.method.actions if one.name == "frequency")
    assert action.below == found  # type: ignore[attr-defined]
    assert len(found) >= 2
    times = [found.get(name, math.inf) for name in ("k = 1", "k = 3", "k = 5")]
    assert program.signals["frequency.order"] == spearman([1, 3, 5], times)
    assert program.signals["frequency.learned"] == pytest.approx(len(found) / 3)
    assert program.signals["frequency.low"] == pytest.approx(errors["k = 1"], rel=1e-6)
    assert "k = 1 (amplitude 32) at step" in str(action.summary())


def test_it_changes_no_weight_no_statistic_and_no_random_number() -> None:
    def trained(clause: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)
        program = trainc.compile(BASE + clause, nn.Sequential(*layers))
        for _ in range(3):
            program.step(curve_points())
        assert program.module.training
        return {**program.module.state_dict(), "random": torch.get_rng_state()}

    plain, observed = trained(""), trained(f"observe frequency every 1 steps {{ {PROBE} }}")
    assert all(torch.equal(value, observed[name]) for name, value in plain.items())


def drawn() -> tuple[Tensor, Tensor]:
    x = torch.randn(20, 1)
    return x, x.sin()


def test_a_probe_that_draws_is_the_same_again_and_moves_no_stream() -> None:
    spec = (
        BASE + f'observe frequency every 1 steps {{ probe = "{HERE}:drawn", method = projection }}'
    )
    found = []
    for seed in (1, 2):
        model = net()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        program = trainc.compile(spec, model)
        assert torch.equal(before, torch.get_rng_state())
        program.step(curve_points())
        found.append(program.signals["frequency.low"])
    assert found[0] == found[1]


def test_resuming_is_bit_equal() -> None:
    spec = BASE + f"observe frequency every 2 steps {{ {PROBE}, threshold = 0.8 }}"
    program = trainc.compile(spec, net())
    for _ in range(30):
        program.step(curve_points())
    fresh = trainc.compile(spec, net())
    fresh.load_state_dict(copy.deepcopy(program.state_dict()))
    for _ in range(30):
        assert program.step(curve_points()) == fresh.step(curve_points())
    lines = [[a.summary() for a in p.execution.method.actions] for p in (program, fresh)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("fields", "model", "said", "at"),
    [
        (f'probe = "{HERE}:uneven"', net, "no uniform grid", "probe"),
        (
            f'probe = "{HERE}:token_ids"',
            net,
            "neither a grid nor a projection nor a filter",
            "probe",
        ),
        (f'probe = "{HERE}:plane"', net, "3 dimensions, and a grid has one", "probe"),
        (f'probe = "{HERE}:nothing"', net, "0 at every frequency", "probe"),
        (f'probe = "{HERE}:broken"', net, "KeyError", "probe"),
        (f'probe = "{HERE}:net"', net, "must return two tensors", "probe"),
        (f'probe = "{HERE}:missing"', net, "has no `missing`", "probe"),
        (f"{PROBE}, highest = 40", net, "no frequency above 32", "highest"),
        (f"{PROBE}, method = filter, width = 1e-4", net, "too small", "width"),
    ],
)
def test_what_is_no_probe_is_an_error_at_its_field(
    fields: str, model: Callable[[], nn.Module], said: str, at: str
) -> None:
    with pytest.raises(trainc.SpecError, match=said) as failed:
        trainc.plan(BASE + f"observe frequency every 1 steps {{ {fields} }}", model())
    (found,) = failed.value.diagnostics
    assert found.labels[0].span.text == dict(part.split(" = ") for part in fields.split(", "))[at]


@pytest.mark.parametrize(
    "fields", ["method = filter", "width = 1", "method = filter, width = 1, highest = 3"]
)
def test_fields_of_another_method_are_refused(fields: str) -> None:
    assert (
        trainc.check(BASE + f"observe frequency every 1 steps {{ {PROBE}, {fields} }}").spec is None
    )


def test_outputs_of_another_shape_are_an_error_of_the_step() -> None:
    spec = BASE + f'observe frequency every 1 steps {{ probe = "{HERE}:two_outputs" }}'
    program = trainc.compile(spec, net())
    with pytest.raises(ValueError, match="2 targets for each of 64 samples"):
        program.step(curve_points())


def test_a_model_of_other_inputs_is_an_error_at_the_probe() -> None:
    spec = BASE + f"observe frequency every 1 steps {{ {PROBE} }}"
    program = trainc.compile(spec, nn.Linear(3, 1))
    with pytest.raises(
        ValueError, match=r"does not take the inputs \[64, 1\] of the probe"
    ) as failed:
        program.step((torch.zeros(2, 3), torch.zeros(2, 1)))
    assert failed.value.field == "probe"  # type: ignore[attr-defined]


class Named(nn.Module):
    """A model whose outputs have names, and more than one could be meant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x, "curve": self.inner(x)}


@pytest.mark.parametrize("loss_first", [True, False])
def test_the_output_is_the_one_that_the_loss_reads(loss_first: bool) -> None:
    clause = f"observe frequency every 1 steps {{ {PROBE} }} "
    plain = trainc.compile(BASE + clause, net())
    named = BASE.replace("loss mse", "")
    loss = 'loss mse { output = "curve" } '
    text = loss + named + clause if loss_first else clause + named + loss
    program = trainc.compile(text, Named())
    for one in (plain, program):
        one.step(curve_points())
    for name, value in plain.signals.items():
        if name.startswith("frequency"):
            assert program.signals[name] == value


def test_a_run_records_amplitudes_and_draws_them(tmp_path: Path) -> None:
    spec = tmp_path / "curve.train"
    spec.write_text(
        'model "examples.models:tanh_net"\n'
        'data "examples.data:curve" { batch = 64 samples }\n'
        "loss mse\noptimizer adamw { lr = 1e-2 }\nrun { length = 30 steps, device = cpu }\n"
        f"observe frequency every 5 steps {{ {PROBE} }}\n"
    )
    train(spec, tmp_path / "run", quiet=True)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    (sizes, *_) = (r["series"]["frequency.amplitude"] for r in rows if "series" in r)
    assert sizes == pytest.approx({"k = 1": 32, "k = 3": 19.2, "k = 5": 12.8}, rel=1e-5)
    from trainc.compiler.driver.recorded_clauses import draw_runs, tables_of
    from trainc.runtime.report.run_records import RunRecords

    records = RunRecords.of(tmp_path / "run", "run", "C0")
    (table,) = tables_of(records)
    assert [row[:2] for row in table.rows] == [
        ("k = 1", "32"),
        ("k = 3", "19.2"),
        ("k = 5", "12.8"),
    ]
    pytest.importorskip("matplotlib")
    assert draw_runs([tmp_path / "run"], tmp_path / "picture.png").exists()


def test_a_rule_ends_a_run_without_gradients_when_the_lowest_frequency_is_learned(
    tmp_path: Path,
) -> None:
    spec = tmp_path / "curve.train"
    spec.write_text(
        'model "examples.models:tanh_net"\ndata "examples.data:curve" { batch = 64 samples }\n'
        'loss mse\noptimizer scipy { method = "Powell" }\nrun { length = 30 steps, device = cpu }\n'
        f"observe frequency every 1 steps {{ {PROBE} }}\nwhen frequency.low < 0.2 {{ stop }}\n"
    )
    summary = train(spec, tmp_path / "run", quiet=True)
    assert summary.reason == "stopped"
    assert summary.steps < 30


@pytest.mark.parametrize("method", ["grid", "projection"])
def test_the_highest_frequency_is_a_local_maximum_only_if_the_next_one_is_not_larger(
    method: Any,
) -> None:
    """The target has amplitudes 2 at k = 1 and 4 at k = 6, and little by little less below that."""
    x = torch.arange(64, dtype=torch.float64)[:, None] / 64
    y = sum(a * torch.cos(2 * math.pi * k * x) for k, a in ((1, 2), (4, 1), (5, 2), (6, 4)))
    assert isinstance(y, Tensor)
    for highest, peaks in ((5, ["k = 1"]), (6, ["k = 1", "k = 6"])):
        made = construct(method=method, highest=highest, peaks="local")
        assert [*made.probe_of(x, y).names] == peaks
        every = construct(method=method, highest=highest, peaks="all").probe_of(x, y)
        assert max(every.shown) == highest


def test_a_filter_of_no_width_has_no_high_part_however_many_samples_there_are() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count in (20, 60):
        with pytest.raises(ValueError, match="the width is too small"):
            construct(method="filter", width=1e-9).probe_of(x[:count], x[:count, :1])
    y, width = (
        x[:, :1].sin(),
        1e-3,
    )  # nearly no sample has a neighbour at this distance, but for the first two
    x[1] = x[0] + width / math.sqrt(5)
    probe = construct(method="filter", width=width).probe_of(x, y)
    near = math.exp(-0.5)
    low = [(a + near * b) / (1 + near) for a, b in ((y[0], y[1]), (y[1], y[0]))]
    assert probe.parts(y)[0][:2, 0].tolist() == pytest.approx([float(one) for one in low], rel=1e-9)


def conformance() -> Setup:
    """Return a curve in place of the language model."""

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        x, y = curve_points()
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:6]
        return x[rows], y[rows]

    rest = "loss mse optimizer adamw { lr = 1e-2 } run { length = 400 steps, seed = 3 }"
    return Setup(net, batch, rest)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the errors of a step, by the program and by definition."""
    model = net().double()
    program = trainc.compile(BASE + f"observe frequency every 1 steps {{ {PROBE} }}", model)
    x, y = (one.double() for one in curve_points())
    program.step((x, y))
    errors = construct().reference(*curve_points(), model(x).detach())
    got = {name: program.signals[f"frequency.{name}"] for name in ("low", "high")}
    want = {"low": errors["k = 1"], "high": errors["k = 5"]}
    double = torch.float64
    return {n: torch.tensor(v, dtype=double) for n, v in got.items()}, {
        n: torch.tensor(v, dtype=double) for n, v in want.items()
    }
