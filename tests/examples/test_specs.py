"""Every example checks, plans, and trains: finite, and resumed as if it had never stopped."""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import pytest

import trainc
from trainc.cli.fmt import format_files
from trainc.compiler.driver.train import train
from trainc.runtime.storage.jsonl import read_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECS = sorted(EXAMPLES.glob("*.train"))
# The digits come with scikit-learn.
NEEDS = dict.fromkeys(
    ("digits_resnet", "digits_vit", "digits_known", "digits_adapt", "early_stop", "plateau"),
    "sklearn",
)
STEPS = 6
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[path.stem for path in SPECS])


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a run of an example, which another can start from."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        train(EXAMPLES / f"{name}.train", folder, overrides={"length": "1 steps"}, quiet=True)
        return folder

    return run


def losses(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record]


@every_spec
def test_it_checks_without_a_warning(spec: Path) -> None:
    checked = trainc.check(spec)
    assert checked.spec
    assert [str(diagnostic) for diagnostic in checked.diagnostics] == []


def test_all_are_written_in_the_canonical_form() -> None:
    assert format_files([str(EXAMPLES)], check=True) == 0


@every_spec
def test_it_plans_on_the_meta_device(spec: Path) -> None:
    pytest.importorskip(NEEDS.get(spec.stem, "torch"))
    plan = trainc.plan(spec)
    assert plan.parameters
    assert [str(warning) for warning in plan.warnings] == []
    assert [clause for clause in plan.clauses if clause["dropped"]] == []


@every_spec
def test_it_trains_and_resumes_bit_for_bit(
    spec: Path, started: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS.get(spec.stem, "torch"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = tmp_path / spec.name
    for source in EXAMPLES.glob("*.py"):  # what `text` trains on lies beside the spec
        shutil.copy(source, tmp_path)
    short.write_text(re.sub("eval_batches = [0-9]+", "eval_batches = 1", spec.read_text()))
    overrides = {"length": f"{STEPS} steps"}
    if start := re.search('let start = "runs/(.+)"', spec.read_text()):
        overrides["start"] = json.dumps(str(started(start[1])))
    done = train(short, whole, overrides=overrides, quiet=True)
    assert (done.reason, done.steps) == ("finished", STEPS)
    assert done.eval_loss is not None
    assert math.isfinite(done.eval_loss)
    assert all(math.isfinite(record["loss"]) for record in losses(whole))
    with monkeypatch.context() as patch:
        patch.setattr("trainc.runtime.run.loop.StopSignals", HalfWay)
        left = train(short, parts, overrides=overrides, quiet=True)
    assert (left.reason, left.steps) == ("interrupted", STEPS // 2)
    resumed = train(short, parts, overrides=overrides, resume=True, quiet=True)
    assert (resumed.reason, resumed.steps) == ("finished", STEPS)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


class HalfWay:
    """Asks a run to leave after half its steps, as a signal does."""

    def __init__(self) -> None:
        self.steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the process's signals as they are."""

    def requested(self) -> str | None:
        self.steps += 1
        return "interrupted" if self.steps > STEPS // 2 else None
