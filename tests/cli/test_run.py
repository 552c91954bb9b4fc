"""`trainc run`, as a process: killed at several points and resumed it ends bit-equal; signals save and leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainc.runtime.storage import checkpoint

ROOT = Path(__file__).parents[2]
SPEC = """
train 1
model "examples.models:gpt" { layers = 2, width = 32, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = 4 samples, micro = 2 samples, context = 16, limit_bytes = 30_000 }
loss cross_entropy
run { length = 40 steps, seed = 5, eval = 10 steps, checkpoint = 6 steps, eval_batches = 2 }
optimizer adamw { lr = 3e-3 * (warmup(10%) then cosine()), weight_decay = 0.1 on ndim(2), clip = 1.0 }
lr temp_balance on "blocks.**" & ndim(2) every 7 steps
noise_scale gns on type(LayerNorm) { smooth = 5 steps }
mask sift on "blocks.*.mlp.**" & ndim(2) { density = 20% }
regularize l2_sp on "head" { weight = 0.01 }
observe norm_growth on ndim(2) every 3 steps
when step > 12 cooldown 9 steps { batch = 6 samples }
"""


def command(spec: Path, out: Path, *options: str) -> list[str]:
    program = "import sys; from trainc.cli.app import main; main()"
    return [
        sys.executable,
        "-P",
        "-c",
        program,
        "run",
        str(spec),
        "--out",
        str(out),
        "--plain",
        *options,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(spec: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(spec, out, *options),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stopped_by(number: signal.Signals, spec: Path, out: Path, at: int, *options: str) -> int:
    """Start a run, send it a signal once it has written `at` lines, and return its exit status."""
    with subprocess.Popen(
        command(spec, out, *options),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while lines(out) < at and process.poll() is None:
            assert time.monotonic() < deadline, "the run wrote nothing"
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=120)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "small.train"
    path.write_text(SPEC)
    return path


@pytest.fixture(scope="module")
def straight(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    done = run(spec, out)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_run(out: Path, straight: Path) -> None:
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    states = [
        checkpoint.load_checkpoint(found)
        for run in (out, straight)
        if (found := checkpoint.find_latest(run / "checkpoints").path)
    ]
    ours, theirs = (state["program"]["model"] for state in states)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_killed_at_several_points_ends_bit_equal(
    spec: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for i, at in enumerate((8, 17, 31)):
        stopped_by(signal.SIGKILL, spec, out, at, *(["--resume"] if i else []))
    done = run(spec, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, straight)


def test_sigterm_saves_a_checkpoint_and_ends_the_run(
    spec: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert stopped_by(signal.SIGTERM, spec, out, 9) == 143
    found = checkpoint.find_latest(out / "checkpoints")
    assert found.step is not None
    assert found.step >= 8
    assert run(spec, out, "--resume").returncode == 0
    assert_same_run(out, straight)


def test_the_folder_has_spec_and_plan_of_the_run(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["reason"] == "finished"
    assert summary["steps"] == 40
    told = "\n".join(summary["lines"])
    for label in ("temp_balance", "gns", "sift", "l2_sp", "norm_growth", "adamw"):
        assert label in told
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert {r["batch"] for r in records if "batch" in r} == {4, 6}
    assert (straight / "spec.train").read_text() == SPEC


def test_an_existing_run_is_not_overwritten(spec: Path, straight: Path) -> None:
    again = run(spec, straight)
    assert again.returncode == 1
    assert "resume" in again.stderr
    assert "Traceback" not in again.stderr


def test_resuming_under_a_changed_spec_asks_first(
    spec: Path, straight: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "small.train"
    changed.write_text(SPEC.replace("clip = 1.0", "clip = 0.5"))
    refused = run(changed, straight, "--resume")
    assert refused.returncode == 1
    assert "clip" in refused.stderr
    assert "--accept" in refused.stderr
