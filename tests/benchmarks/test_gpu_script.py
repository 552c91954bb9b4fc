"""The GPU benchmark, tried on a CPU: all of it but graphs and events runs, and it notices mistakes."""

import json
import os
import shutil
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

# A machine that has torch, triton and numpy alone, made of this one: neither trainc nor what it depends on is found,
# and without `site` no editable install speaks up.
BARE = """
import runpy, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lark", "pydantic", "rich", "safetensors", "typer", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
sys.path[:] = [one for one in sys.path if one]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CHECKOUT = ("benchmarks", "compiler", "dsl", "kernels", "runtime", "trainc", "pyproject.toml")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, where the benchmarks are a package."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_checks_and_times_every_operator(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("-m", "benchmarks.gpu", "--dry-run", "--parts", "operators", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["device"] == "dry run"
    assert found["failed"] == found["left out"] == []
    operators = {row["operator"].partition(",")[0] for row in found["rows"]}
    assert {
        "layer_norm",
        "rms_norm",
        "noisy_add",
        "cross_entropy_consistency",
        "sparse_adamw_",
    } <= operators
    for row in found["rows"]:
        assert row["passed"], row
        assert row["repeatable"], row
        assert row["times"]["ours"]["forward"]["median"] > 0
        assert {"aten", "inductor"} <= set(row["times"])


@pytest.mark.slow
def test_a_dry_run_checks_and_times_whole_steps(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ("--dry-run", "--parts", "steps", "--models", "124m", "--only", "plain", "gns")
    done = run("-m", "benchmarks.gpu", *options, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["steps"]["rows"]
    assert [row["case"] for row in rows] == ["plain", "gns on norms"]
    for row in rows:
        assert row["passed"], row
        assert row["uncompiled"] is None, row
        assert row["tokens/s"] > 0
        assert row["case"] in done.stdout


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


@pytest.mark.slow
def test_it_starts_from_a_bare_checkout_where_nothing_of_ours_is_installed(tmp_path: Path) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "gpu.json"
    checkout.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name)
        else:
            shutil.copy(ROOT / name, checkout)
    installed = [path for path in sys.path if "site-packages" in path]
    command = [sys.executable, "-S", "-W", "ignore", "-c", BARE, "benchmarks/gpu.py"]
    done = subprocess.run(
        [*command, "--dry-run", "--only", "rms_norm", "cross_entropy", "--out", str(out)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(installed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("dry run; torch ")
    found = json.loads(out.read_text())
    assert {row["operator"] for row in found["rows"]} >= {
        "rms_norm, probe",
        "cross_entropy_consistency, kl",
    }
    assert found["failed"] == []
    # Compiling a spec needs more than torch, triton and numpy.
    assert found["steps"] == {"not measured": "needs lark, pydantic, safetensors"}
    assert "not measured: needs lark" in done.stdout


def test_every_operator_is_measured_once_before_any_is_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ("--dry-run", "--parts", "operators", "--seconds", "0", "--out", str(out))
    assert run("-m", "benchmarks.gpu", *options).returncode == 0
    names = [name for name, *_ in json.loads(out.read_text())["left out"]]
    first = names[: len(set(names))]
    assert len(first) == len(set(first))
    assert len(names) > len(first)
