"""Where a spec leaves `every` out, a clause acts at its construct's own interval."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.catalog import catalog, check
from trainc.compiler.driver.train import train
from trainc.dsl.printing.reference_pages import construct_page
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.storage.jsonl import read_jsonl

REST = "loss mse optimizer sgd { lr = 0.1 } "
OF_EVALUATIONS = {"calibration", "margin"}
OF_STEPS = sorted({n for kind, n in catalog() if kind == "observe"} - OF_EVALUATIONS)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def batch() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, generator=made), torch.randn(4, 2, generator=made)


def times(program: trainc.Program, steps: int) -> list[int]:
    """Return the steps in which the distance is measured."""
    return [n for n in range(steps) if "distance" in program.step(batch())]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the distance be measured every 3 steps where a spec says nothing."""
    monkeypatch.setattr(catalog()["observe", "distance"], "default_every", "3 steps")


@pytest.mark.parametrize("name", OF_STEPS)
def test_observers_of_steps_have_the_interval_of_their_example(name: str) -> None:
    cls = catalog()["observe", name]
    assert cls.default_every is not None
    assert f" every {cls.default_every}" in cls.usage
    assert (
        f"Acts every {cls.default_every}; `every` changes that." in construct_page(cls).splitlines()
    )
    written = check(REST + cls.usage).unwrap()
    left_out = check(REST + re.sub(r" every \d+ steps", "", cls.usage)).unwrap()
    assert left_out == written
    assert [c.paced_by_default for c in left_out.of_kind("observe")] == [True]
    assert [c.paced_by_default for c in written.of_kind("observe")] == [False]


@pytest.mark.parametrize("name", sorted(OF_EVALUATIONS))
def test_observers_of_evaluations_have_none(name: str) -> None:
    cls = catalog()["observe", name]
    (clause,) = check(REST + cls.usage).unwrap().of_kind("observe")
    assert clause.every is None
    assert "Acts every" not in construct_page(cls)


@pytest.mark.usefixtures("short")
def test_a_clause_acts_at_its_own_interval_and_at_the_one_that_is_written() -> None:
    for clause, want in {
        "observe distance": [0, 3, 6, 9],
        "observe distance from 2 steps until 9 steps": [2, 5, 8],
        "observe distance every 1 steps": [*range(10)],
        "observe distance every 4 steps": [0, 4, 8],
        "observe distance every 4 samples": [*range(10)],
    }.items():
        assert times(trainc.compile(REST + clause, net()), 10) == want, clause


@pytest.mark.usefixtures("short")
def test_a_program_that_goes_on_measures_at_the_same_times() -> None:
    program = trainc.compile(REST + "observe distance", net())
    assert times(program, 4) == [0, 3]
    state = program.state_dict()
    resumed = trainc.compile(REST + "observe distance", net())
    resumed.load_state_dict(state)
    assert times(resumed, 6) == times(program, 6) == [2, 5]


def test_the_plan_shows_it_and_knows_no_difference_to_the_written_one() -> None:
    default = trainc.plan(REST + "observe distance", net())
    written = trainc.plan(REST + "observe distance every 50 steps", net())
    other = trainc.plan(REST + "observe distance every 1 steps", net())
    assert default.hash == written.hash != other.hash
    rows = {row["name"]: row["every"] for row in default.steps if row["clause"] == "distance"}
    assert rows["observe"] == "every 50 steps"
    assert "observe distance every 50 steps" in str(default)


def test_a_clause_made_in_python_has_it_too() -> None:
    cls = catalog()["observe", "distance"]
    clause = Clause(cls())
    assert str(clause.every) == "50 steps"
    assert clause.paced_by_default
    assert not Clause(cls(), every="1 steps").paced_by_default  # type: ignore[arg-type]
    spec = check(REST + "observe distance").unwrap()
    assert spec.clauses[-1] == clause
    assert Spec.from_json(spec.to_json(), catalog()) == spec


def recorded(folder: Path, clauses: str) -> list[dict[str, float]]:
    """Return the records of the steps of a run."""
    folder.mkdir()
    (folder / "far.train").write_text(
        'model "examples.models:teacher_student"\n'
        'data "examples.data:teacher" { batch = 4 samples, samples = 64 }\n'
        "loss mse\nrun { length = 12 steps, seed = 3 }\noptimizer sgd { lr = 0.1 }\n" + clauses
    )
    train(folder / "far.train", folder / "run", quiet=True)
    return [line for line in read_jsonl(folder / "run" / "metrics.jsonl") if "loss" in line]


@pytest.mark.usefixtures("short")
def test_a_rule_reads_what_was_measured_at_the_interval(tmp_path: Path) -> None:
    first, second, *_ = recorded(tmp_path / "all", "observe distance every 1 steps")
    limit = (first["distance"] + second["distance"]) / 2
    assert first["distance"] < limit
    rule = f"\nwhen distance > {limit} {{ stop }}"
    steps = {
        every: len(recorded(tmp_path / f"run{every}", f"observe distance {every}{rule}"))
        for every in ("every 1 steps", "every 2 steps", "")
    }
    assert steps == {"every 1 steps": 2, "every 2 steps": 3, "": 4}


def test_a_run_that_is_shorter_than_the_interval_is_a_warning_at_the_head() -> None:
    text = REST + "run { length = 40 steps } observe distance"
    (said,) = check(text).diagnostics
    assert (said.rule, said.severity) == ("never-acts", "warning")
    assert said.span is not None
    assert said.span.text == "observe distance"
    assert "`every 50 steps`, which it has without one of its own" in said.message
    assert said.help == "write a shorter `every`"
    assert not check(text + " every 40 steps").diagnostics
    (written,) = check(text + " every 50 steps").diagnostics
    assert written.severity == "error"
    assert written.span is not None
    assert written.span.text == "50 steps"


def test_a_start_in_another_unit_says_what_to_write() -> None:
    with pytest.raises(trainc.SpecError, match="write `every` in seconds, as `from` is"):
        trainc.plan(REST + "observe distance from 60 seconds", net())
    trainc.plan(REST + "observe distance from 60 seconds every 60 seconds", net())
