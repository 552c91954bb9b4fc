"""A run that is stopped, killed or signalled continues bit for bit."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import fake
from tests.runtime.fake import FakeData, FakeProgram, Points
from tests.runtime.runs import assert_equal_runs, outcome, run
from trainc.runtime.data.batch import Batch
from trainc.runtime.run.loop import train
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.checkpoint import DamagedCheckpoint
from trainc.runtime.storage.differences import ChangedRun, Difference
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.run_folder import NoCheckpoint, RunFolderLost


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
        run(tmp_path, stop_after=stop_after, resume=stop_after > 1)
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)


def script(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(fake.__file__), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def continued(out: Path) -> None:
    """Finish a killed run: from its checkpoint, or anew where it was killed before it had one."""
    if checkpoint.find_latest(out / "checkpoints").path is None:
        metrics = (out / "metrics.jsonl").read_bytes()
        with pytest.raises(NoCheckpoint, match=r"before its first save\. Leave out `--resume` to"):
            run(out, resume=True)
        assert (out / "metrics.jsonl").read_bytes() == metrics
        assert run(out).reason == "finished"
        (told,) = (r for r in read_jsonl(out / "events.jsonl") if r["event"] == "started-again")
        assert str(out / "previous-1") in told["message"]
        assert (out / "previous-1/metrics.jsonl").read_bytes() == metrics
    else:
        assert run(out, resume=True).reason == "finished"


@pytest.mark.parametrize("step", [3, 11, 18])
def test_a_killed_run_continues_bit_for_bit(whole: Path, tmp_path: Path, step: int) -> None:
    assert script(tmp_path, "--kill-at", str(step)).returncode == -signal.SIGKILL
    continued(tmp_path)
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize("call", [0, 3, 4, 6, 8])
def test_a_kill_while_saving_loses_no_checkpoint(whole: Path, tmp_path: Path, call: int) -> None:
    # A save reaches the disk five times: three files, their folder and, renamed, its parent.
    assert script(tmp_path, "--kill-in-save", str(call)).returncode == -signal.SIGKILL
    expected = 0 if call < 4 else 6 if call < 9 else 12
    found = checkpoint.find_latest(tmp_path / "checkpoints")
    assert (found.step, found.damage) == (expected, ())
    continued(tmp_path)
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


def test_a_folder_without_a_run_is_not_resumed_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match=r"leave out `--resume` to start a run$"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_records_of_later_steps_are_cut_without_a_copy(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, stop_after=7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "los')
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)
    assert not list(tmp_path.glob("*.damaged-*"))


@pytest.mark.parametrize("line", ["oops", '{"step": "two"}', '{"step": true}', "[1]"])
@pytest.mark.parametrize("at", [0, 2, 7])
def test_records_that_no_run_wrote_are_kept_in_a_copy(
    whole: Path, tmp_path: Path, line: str, at: int
) -> None:
    run(tmp_path, stop_after=7)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    lines += ['{"step": 8, "loss": 1.0}\n'] if at == 7 else []
    metrics.write_text("".join([*lines[:at], f"{line}\n", *lines[at:]]))
    changed = metrics.read_bytes()
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == changed
    told = [r for r in read_jsonl(tmp_path / "events.jsonl") if r["event"] == "damaged-records"]
    assert "metrics.jsonl.damaged-1 has them" in told[0]["message"]


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_run_whose_folder_vanishes_stops(tmp_path: Path, how: str) -> None:
    out, program = tmp_path / "run", FakeProgram()

    def stop() -> str | None:
        if program.clock.steps == 7:
            out.rename(tmp_path / "moved")
            if how == "removed":
                shutil.rmtree(tmp_path / "moved")
            if how == "replaced":
                out.mkdir()
        return None

    with pytest.raises(RunFolderLost, match="was removed or moved"):
        train(program, FakeData(), out=out, stop_requested=stop)
    assert program.clock.steps == 7
    assert out.exists() == (how == "replaced")
    assert not (out / "checkpoints").exists()


class Named(FakeData):
    """Data with a name for what it holds."""

    fingerprint = "v1"


def other_data(name: str) -> FakeData:
    if name == "longer":
        return FakeData(train=Points(60, 1))
    if name == "more evaluation":
        return FakeData(evaluation=Points(18, 2))
    found = Named() if name == "fingerprint" else FakeData()
    if name == "tokens":
        found.tokens_per_sample = 4
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("longer", "the number of training samples was 50 and is 60"),
        ("tokens", "the number of tokens in a sample was 3 and is 4"),
        ("fingerprint", "the `fingerprint` of the data was not given and is `v1`"),
    ],
)
def test_other_data_needs_accept(tmp_path: Path, name: str, said: str) -> None:
    run(tmp_path, stop_after=7)

    def resumed(accept: bool = False) -> str:
        summary = train(
            FakeProgram(), other_data(name), out=tmp_path, resume=True,
            stop_requested=lambda: "interrupted", accept=accept,
        )  # fmt: skip
        return summary.reason

    with pytest.raises(ChangedRun, match=f"needs --accept: {said}"):
        resumed()
    assert resumed(accept=True) == "interrupted"
    told = [r.get("message", "") for r in read_jsonl(tmp_path / "events.jsonl")]
    assert any(said in message for message in told)
    # The run is now that of the other data, and says so to whoever resumes it.
    assert resumed() == "interrupted"
    with pytest.raises(ChangedRun):
        run(tmp_path, resume=True)


def test_other_evaluation_data_is_noted(tmp_path: Path) -> None:
    run(tmp_path, stop_after=7)
    data = other_data("more evaluation")
    done = train(FakeProgram(), data, out=tmp_path, resume=True, stop_requested=lambda: None)
    assert done.reason == "finished"
    told = [r["message"] for r in read_jsonl(tmp_path / "events.jsonl") if r["event"] == "note"]
    assert told == ["safe: the evaluation data had 17 samples and has 18"]


class Changing(FakeProgram):
    """A program that differs from what made its checkpoints, and is killed right after it accepted them."""

    def __init__(self, name: str, killed: bool = False) -> None:
        super().__init__()
        self.name, self.killed = name, killed

    def differences(self, state: Mapping[str, Any]) -> list[Difference]:
        return [] if state["name"] == self.name else [Difference("the name is another one")]

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, **super().state_dict()}

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        assert state["name"] != self.name, "nothing was to be accepted"
        self.load_state_dict(state)
        return []

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        if self.killed:
            raise MemoryError
        return super().step(micro_batches)


def test_an_accepted_run_resumes_after_a_kill_before_its_next_save(
    whole: Path, tmp_path: Path
) -> None:
    run(tmp_path, Changing("before"), stop_after=7)
    with pytest.raises(ChangedRun, match="needs --accept: the name is another one"):
        run(tmp_path, Changing("after"), resume=True)
    with pytest.raises(MemoryError):
        run(tmp_path, Changing("after", killed=True), resume=True, accept=True)
    assert run(tmp_path, Changing("after"), resume=True).reason == "finished"
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    run(tmp_path, Changing("after"), resume=True, accept=True)


@pytest.mark.parametrize(("limit", "file"), [(1000, "timing.jsonl"), (1800, "checkpoints/")])
def test_a_full_disk_names_the_file_and_the_last_good_checkpoint(
    whole: Path, tmp_path: Path, limit: int, file: str
) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-P", str(fake.__file__), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=small_files, check=False
    )
    assert done.returncode == 1
    (*_, last_line) = done.stderr.splitlines()
    assert "File too large; " in last_line
    assert str(tmp_path / file) in last_line
    found = checkpoint.find_latest(tmp_path / "checkpoints")
    known = f"is {found.path.name}" if found.path is not None else "there is no checkpoint yet"
    assert known in last_line
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))
