"""`trainc run` under torchrun, as processes: what dies is resumed, what hangs is named, and a signal saves once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.torchrun import spec, torchrun
from trainc.compiler.driver.train import train
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

TIMEOUT = "distribute ddp { timeout = 10 seconds }"


def events(out: Path) -> list[str]:
    return [record["event"] for record in read_jsonl(out / "events.jsonl")]


def last_state(out: Path) -> dict[str, Any]:
    path = checkpoint.find_latest(out / "checkpoints").path
    assert path is not None
    return checkpoint.load_checkpoint(path)


def test_a_rank_is_killed_and_another_terminated_and_the_run_ends_as_one_process_does(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.train").write_text(spec(data="failing"))
    accidents = "0 1 9 kill,1 1 5 terminate"  # at step 5, and 3 steps after the resume from step 3
    done = torchrun(
        2, "trainc", "run", "a.train", "--out", "two",
        cwd=tmp_path, restarts=2, ACCIDENTS=accidents,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished: the run has reached its length") == 1
    assert "2 processes train one model by `distribute ddp`, as the spec has no" in done.stdout
    found = events(tmp_path / "two")
    assert found.count("started") == 3
    assert found.count("resumed") == 2
    assert found.count("terminated") == found.count("finished") == 1
    assert [r["step"] for r in read_jsonl(tmp_path / "two/metrics.jsonl") if "samples" in r] == [
        *range(1, 11)
    ]

    (tmp_path / "b.train").write_text(spec())
    alone = train(tmp_path / "b.train", tmp_path / "one", quiet=True)
    assert alone.steps == 10
    one, two = (last_state(tmp_path / name) for name in ("one", "two"))
    for name, weight in one["program"]["model"].items():
        torch.testing.assert_close(two["program"]["model"][name], weight, rtol=1e-4, atol=1e-6)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)

    longer = spec().replace("length = 10 steps", "length = 12 steps")
    (tmp_path / "b.train").write_text(longer)  # goes on in one process
    resumed = train(tmp_path / "b.train", tmp_path / "two", resume=True, accept=True, quiet=True)
    assert resumed.steps == 12


def test_a_rank_that_fails_and_one_that_hangs_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.train").write_text(spec(TIMEOUT, data="failing"))
    accidents = "0 1 9 raise,1 1 5 sleep"
    done = torchrun(
        2, "trainc", "run", "a.train", "--out", "out",
        cwd=tmp_path, restarts=1, ACCIDENTS=accidents,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("KeyError: 'no such sample'") == 1
    assert "rank 1:\nTraceback" in done.stderr
    assert "rank 1 has failed, so that rank 0 ends as well" in done.stderr
    (line,) = (one for one in done.stderr.splitlines() if "`timeout`" in one)
    assert "rank 1 has been reading the data of step 6 for 10 seconds, at " in line
    assert "torchrun.py:" in line
    assert line.endswith("is 10 seconds: find out what holds the rank up, or write a longer time")
    assert read_jsonl(tmp_path / "out/events.jsonl")[-1]["message"] in line


def test_replicas_that_train_apart_resume_from_a_kill_and_a_signal_with_the_bits_of_a_run_without(
    tmp_path: Path,
) -> None:
    clause = "distribute local every 3 steps { timeout = 60 seconds }"
    text = spec(clause, data="failing", batch=12, micro=6)
    (tmp_path / "a.train").write_text(text)
    accidents = "0 1 9 kill,1 0 5 terminate"  # at step 5, and 3 steps after the resume from step 3
    done = [
        torchrun(
            2, "trainc", "run", "a.train", "--out", out,
            cwd=tmp_path, restarts=2, timeout=600, ACCIDENTS=plan,
        )
        for out, plan in (("disturbed", accidents), ("straight", ""))
    ]  # fmt: skip
    for one in done:
        assert one.returncode == 0, one.stdout + one.stderr
        assert one.stdout.count("finished: the run has reached its length") == 1
    found = events(tmp_path / "disturbed")
    assert found.count("resumed") == 2
    assert found.count("terminated") == found.count("finished") == 1
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("disturbed", "straight")]
    assert lines[0] == lines[1]
    for rank in range(2):
        states = [
            checkpoint.load_checkpoint(tmp_path / name / "checkpoints/step-00000010", rank=rank)
            for name in ("disturbed", "straight")
        ]
        want, got = (state["program"]["model"] for state in states)
        assert all(torch.equal(got[name], weight) for name, weight in want.items())
