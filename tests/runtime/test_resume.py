"""A run that is stopped, killed or signalled continues bit for bit."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runtime import fake
from tests.runtime.fake import FakeProgram
from tests.runtime.runs import assert_equal_runs, outcome, run
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.checkpoint import DamagedCheckpoint
from trainc.runtime.storage.jsonl import read_jsonl


def test_two_runs_are_equal(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "again")
    assert_equal_runs(whole, tmp_path / "again")


def test_another_seed_is_another_run(whole: Path, tmp_path: Path) -> None:
    program = FakeProgram()
    program.settings = replace(program.settings, seed=8)
    run(tmp_path, program)
    assert outcome(whole)[0] != outcome(tmp_path)[0]


@pytest.mark.parametrize("stop_after", [0, 1, 4, 6, 9, 12, 13, 19, 20])
def test_an_interrupted_run_continues_bit_for_bit(
    whole: Path, tmp_path: Path, stop_after: int
) -> None:
    first = run(tmp_path, stop_after=stop_after)
    assert first.steps == stop_after
    assert first.reason == ("interrupted" if stop_after < 20 else "finished")
    assert run(tmp_path, resume=True).reason == "finished"
    assert_equal_runs(whole, tmp_path)


def test_a_run_may_be_interrupted_after_every_step(whole: Path, tmp_path: Path) -> None:
    for stop_after in range(1, 20):
        run(tmp_path, stop_after=stop_after, resume=True)
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)


def script(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(fake.__file__), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("step", [3, 11, 18])
def test_a_killed_run_continues_bit_for_bit(whole: Path, tmp_path: Path, step: int) -> None:
    assert script(tmp_path, "--kill-at", str(step)).returncode == -signal.SIGKILL
    assert run(tmp_path, resume=True).reason == "finished"
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize("call", [0, 3, 4, 6, 8])
def test_a_kill_while_saving_loses_no_checkpoint(whole: Path, tmp_path: Path, call: int) -> None:
    # A save reaches the disk five times: three files, their folder and, renamed, its parent.
    assert script(tmp_path, "--kill-in-save", str(call)).returncode == -signal.SIGKILL
    expected = 0 if call < 4 else 6 if call < 9 else 12
    found = checkpoint.find_latest(tmp_path / "checkpoints")
    assert (found.step, found.damage) == (expected, ())
    assert run(tmp_path, resume=True).reason == "finished"
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize(
    ("number", "reason", "status"),
    [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)],
)
def test_a_signal_saves_a_checkpoint_and_ends_the_run(
    tmp_path: Path, number: signal.Signals, reason: str, status: int
) -> None:
    command = [sys.executable, "-P", str(fake.__file__), str(tmp_path), "--slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            while not (tmp_path / "checkpoints").exists():
                assert process.poll() is None
            process.send_signal(number)
            assert process.wait(60) == status
        finally:
            process.kill()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reason"] == reason
    assert checkpoint.find_latest(tmp_path / "checkpoints").step == summary["steps"] > 0
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == summary["steps"]


def test_a_run_skips_a_damaged_checkpoint_and_names_it(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, stop_after=13)
    victim = tmp_path / "checkpoints/step-00000013" / checkpoint.TENSORS
    victim.write_bytes(victim.read_bytes()[:-1])
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)
    told = [
        r["message"]
        for r in read_jsonl(tmp_path / "events.jsonl")
        if r["event"] == "damaged-checkpoint"
    ]
    assert len(told) == 1
    assert str(victim) in told[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    run(tmp_path, stop_after=3)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "checkpoints/step-00000003" / checkpoint.STATE).unlink()
    with pytest.raises(DamagedCheckpoint, match="no checkpoint can be used"):
        run(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_an_evaluation_that_a_stop_prevented_is_made_on_resume(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, stop_after=8)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval_loss" in lines[-1]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)
