"""The GPU benchmark, tried on a CPU: all of it but graphs and events runs, and it notices mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SABOTAGE = """
import torch
from dataclasses import replace
from benchmarks.device import check
from benchmarks.operators import Size, norm

problem = norm(rms=False, add=False, probed=True)(Size(3, 5, 16), torch.float32, "cpu")
good, calls = problem.ours, iter(range(100))
unsteady = replace(problem, ours=lambda *given: good(*given) * (1 + 1e-6 * next(calls)))
wrong = replace(problem, ours=lambda *given: good(*given) * 1.01)
unwritten = replace(problem, ours=lambda *given: good(*given).index_fill(0, torch.tensor([1]), torch.nan))
for one in (problem, unsteady, wrong, unwritten):
    found = check(one, torch.float32)
    print(found["passed"], found["repeatable"])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, where the benchmarks are a package."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_checks_and_times_every_operator(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("-m", "benchmarks.gpu", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["device"] == "dry run"
    assert found["failed"] == found["left out"] == []
    operators = {row["operator"].partition(",")[0] for row in found["rows"]}
    assert {"layer_norm", "rms_norm", "noisy_add", "loss", "sparse_adamw_"} <= operators
    for row in found["rows"]:
        assert row["passed"], row
        assert row["repeatable"], row
        assert row["times"]["ours"]["forward"]["median"] > 0
        assert {"aten", "inductor"} <= set(row["times"])


def test_time_that_is_spent_leaves_cases_out(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ("--dry-run", "--only", "layer_norm", "--seconds", "0", "--out", str(out))
    assert run("-m", "benchmarks.gpu", *options).returncode == 0
    found = json.loads(out.read_text())
    assert found["rows"] == []
    assert len(found["left out"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    done = run("-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_check_notices_wrong_unwritten_and_unsteady_results() -> None:
    done = run("-c", SABOTAGE)
    assert done.stdout.splitlines() == ["True True", "True False", "False True", "False False"], (
        done.stderr
    )
