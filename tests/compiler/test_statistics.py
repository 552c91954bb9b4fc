"""Statistics of gradients: what a clause has measured at its times, and what it costs while its gate is closed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.errors import SiteError
from trainc.compiler.layers.linear import BoundLinear
from trainc.compiler.layers.norm import BoundLayerNorm, BoundNormGradients
from trainc.compiler.per_example import statistics
from trainc.compiler.program.program import Program
from trainc.runtime.step.record import Contribution

STEPS = 7
HEAD = "train 1\nloss cross_entropy\noptimizer sgd { lr = 0.1 }\n"
METHODS = {
    "rows": "{ smooth = 2 steps }",
    "jackknife": "{ smooth = 2 steps, interval = jackknife }",
    "micro-batches": "{ smooth = 2 steps, method = micro_batch }",
}
TIMES: dict[str, Callable[[int], bool]] = {
    "from 3 steps": lambda t: t >= 3,
    "until 3 steps": lambda t: t < 3,
    "every 3 steps": lambda t: t % 3 == 0,
    "from 1 steps until 6 steps every 2 steps": lambda t: t in (1, 3, 5),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    return torch.randn(6, 5, generator=g).double(), torch.randint(3, (6,), generator=g)


def parts(t: int) -> list[tuple[Tensor, Tensor]]:
    """Return a step's two micro-batches."""
    inputs, targets = batch(t)
    return [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]


def compiled(clauses: str, executor: Any = "auto") -> Program:
    return trainc.compile(HEAD + clauses, model(), executor=executor)


def contributions(program: Program) -> list[Contribution]:
    last = program._runner.last
    assert last is not None
    return last.contributions


@pytest.mark.parametrize("executor", ["auto", "module"])
@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("times", TIMES)
def test_what_is_measured_at_its_times_is_what_would_be_measured_always(
    times: str, fields: str, executor: Any
) -> None:
    at_times = compiled(f"noise_scale gns on type(LayerNorm) {times} {fields}", executor)
    always = compiled(f"noise_scale gns on type(LayerNorm) {fields}", executor)
    for t in range(STEPS):
        found, all_of_them = at_times.step(parts(t)), always.step(parts(t))
        assert (len(contributions(at_times)) == 2) == TIMES[times](t)
        assert ("gns.signal" in found) == TIMES[times](t)
        assert "gns.signal" in all_of_them
        for one, other in zip(contributions(at_times), contributions(always), strict=False):
            torch.testing.assert_close(one.weights, other.weights)
            torch.testing.assert_close(one.sq_norms, other.sq_norms)
            torch.testing.assert_close(one.gradients, other.gradients)
            torch.testing.assert_close(one.batch_sq_norms, other.batch_sq_norms)


@pytest.mark.parametrize("executor", ["auto", "module"])
@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_closed_statistic_costs_nothing(
    fields: str, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any) -> Any:
            calls.append(name)
            return run(*args)

        return instead

    for layer in (BoundLayerNorm, BoundNormGradients):
        monkeypatch.setattr(layer, "run_operator", noted("operator", layer.run_operator))
    monkeypatch.setattr(statistics, "squared_norm", noted("norm", statistics.squared_norm))
    plain = compiled("", executor)
    program = compiled(f"noise_scale gns on type(LayerNorm) from 3 steps {fields}", executor)
    watched = program.execution
    monkeypatch.setattr(watched.statistics, "weigh", noted("weigh", watched.statistics.weigh))
    monkeypatch.setattr(watched, "run_graph", noted("graph", watched.run_graph))
    for t in range(3):
        assert program.step(batch(t))["loss"] == plain.step(batch(t))["loss"]
    assert calls == []
    for name, weight in program.module.state_dict().items():
        assert torch.equal(weight, plain.module.state_dict()[name]), name
    program.step(batch(3))
    assert "weigh" in calls


def test_what_an_example_is_matters_only_while_it_is_measured() -> None:
    clause = "noise_scale gns on type(LayerNorm) from 2 steps { example = document, separator = 0 }"
    program = compiled(clause)
    # The inputs hold no tokens, so that they cannot be divided into documents.
    program.step(batch(0))
    program.step(batch(1))
    with pytest.raises(SiteError, match="documents need"):
        program.step(batch(2))


@pytest.mark.parametrize("executor", ["auto", "module"])
def test_clauses_with_times_of_their_own_measure_their_layers(executor: Any) -> None:
    norm = "noise_scale gns as norm on type(LayerNorm) until 4 steps"
    all_layers = "noise_scale gns as full on all from 2 steps"
    program = compiled(f"{norm} {all_layers}", executor)
    always = compiled("noise_scale gns on all", executor)
    for t in range(STEPS):
        program.step(batch(t))
        always.step(batch(t))
        names = {"1.weight", "1.bias"}
        names |= {f"{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")} if t >= 2 else set()
        (found,), (other,) = contributions(program), contributions(always)
        assert found.sq_norms.keys() == names
        for name in names:
            torch.testing.assert_close(found.sq_norms[name], other.sq_norms[name])


def test_there_is_one_graph_for_the_steps_that_measure_and_one_for_the_others() -> None:
    program = compiled("noise_scale gns on type(LayerNorm) every 2 steps", "graph")
    for t in range(4):
        program.step(batch(t))
    captured = [graph.interface for graph in program.execution.graphs._trusted]
    assert [interface and interface.probes for interface in captured] == [("1",), ()]


def test_a_loaded_graph_does_not_run_the_steps_for_which_it_was_not_captured(
    tmp_path: Path,
) -> None:
    program = compiled("noise_scale gns on type(LayerNorm) every 2 steps", "graph")
    program.step(batch(0))
    program.save(tmp_path / "saved")
    loaded = trainc.load(tmp_path / "saved", model(), executor="graph")
    loaded.load_state_dict(copy.deepcopy(program.state_dict()))
    for t in range(1, 4):
        assert program.step(batch(t)) == loaded.step(batch(t))


def test_a_linear_layer_runs_as_it_is_while_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    own = BoundLinear.run_operator

    def noted(self: Any, x: Tensor) -> Tensor:
        ran.append(True)
        return own(self, x)

    monkeypatch.setattr(BoundLinear, "run_operator", noted)
    program = compiled("noise_scale gns on type(Linear) from 2 steps", "module")
    counts = []
    for t in range(4):
        program.step(batch(t))
        counts.append(len(ran))
    assert counts == [0, 0, 2, 4]


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_layer_that_is_not_measured_yet_keeps_its_noise(executor: Any) -> None:
    pace = 'regularize pace on "0" { sigma = 0.5, weight = 0.4 } run { length = 9 steps, seed = 4 }'
    noisy = compiled(pace, executor)
    measured = compiled(f"{pace} noise_scale gns on type(Linear) from 2 steps", executor)
    for t in range(4):
        found, known = measured.step(batch(t)), noisy.step(batch(t))
        assert found["loss"] == pytest.approx(known["loss"], rel=1e-12)
        assert found["consistency"] == pytest.approx(known["consistency"], rel=1e-9)
        assert bool(contributions(measured)) == (t >= 2)


def test_replicas_and_micro_batches_are_not_measured_of_one_parameter() -> None:
    clauses = (
        "noise_scale gns as one on all { method = replica } "
        "noise_scale gns as two on all { method = micro_batch }"
    )
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(HEAD + clauses, model())
    assert "measures the gradient of `0.weight` of each replica" in str(caught.value)


def test_examples_that_are_groups_of_one_clause_are_no_rows_of_another() -> None:
    clauses = (
        "noise_scale gns as one on type(LayerNorm) from 2 steps "
        "noise_scale gns as two on type(LayerNorm) { example = document, separator = 0 }"
    )
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(HEAD + clauses, model())
    assert "another clause counts examples differently" in str(caught.value)
