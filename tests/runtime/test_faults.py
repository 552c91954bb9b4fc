"""A run that is killed before or in any file operation, or to which one fails, loses nothing that was saved."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.file_operations import FAULTS, Fault, FileOperations, Killed, Operation
from tests.runtime.fake import FakeProgram
from tests.runtime.runs import outcome, run, same
from tests.runtime.test_resume import Changing
from trainc.runtime.run.summary import Summary
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.storage.checkpoint import find_latest
from trainc.runtime.storage.differences import ChangedRun
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.run_folder import NoCheckpoint, RunFolderLost

HISTORY = {"started", "started-again", "resumed", "failed"}
"""Events that say how often a run was started."""
ENTERED = 3
"""Before this operation there is no run in the folder yet."""


def short(program: FakeProgram) -> FakeProgram:
    """Return a program of 5 steps that evaluates after 3, saves after 2 and 4, and does both at its end."""
    program.length = RunLength(5, "steps")
    program.settings = replace(
        program.settings, evaluate_every=Gate(every=TimeSpan(3, "steps")),
        checkpoint_every=Gate(every=TimeSpan(2, "steps")),
    )  # fmt: skip
    return program


def tried(out: Path, fault: Fault, program: FakeProgram | None = None, **options: Any) -> Summary:
    """Run in a folder in which something goes wrong."""
    with FileOperations(out, fault).installed():
        return run(out, short(program or FakeProgram()), **options)


def undisturbed_run(out: Path, **options: Any) -> list[Operation]:
    """Run, and return the operations."""
    with FileOperations(out).installed() as operations:
        run(out, short(FakeProgram()), **options)
    return operations.seen


def places(operations: list[Operation], kind: str, most: int = 8) -> list[int]:
    """Return the numbers of operations that a fault can happen to, spread over the run."""
    found = [one.number for one in operations if one.name in FAULTS[kind](0).names]
    return sorted({found[i * (len(found) - 1) // (most - 1)] for i in range(most)})


def finished(out: Path, **options: Any) -> Summary:
    """Go on with a run: from its newest checkpoint, or from the beginning where there is none."""
    resume = find_latest(out / "checkpoints").path is not None
    return tried(out, Fault(), resume=resume, **options)


def story(out: Path) -> set[tuple[Any, ...]]:
    """Return what happened in a run, each event once; a resumed checkpoint was saved, whether or not that was told."""
    records = read_jsonl(out / "events.jsonl")
    told = [{**r, "event": "saved"} if r["event"] == "resumed" else r for r in records]
    return {
        (r["step"], r["event"], r.get("checkpoint") or r.get("message"))
        for r in told
        if r["event"] not in HISTORY
    }


def assert_equal(whole: Path, out: Path) -> None:
    """Compare metrics, state, events, summary and the names of all files of two runs."""
    (metrics, state), (others, other_state) = outcome(whole), outcome(out)
    assert others == metrics
    assert same(state, other_state)
    assert story(out) == story(whole)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, out)]
    for summary in summaries:
        summary.pop("seconds")
    assert summaries[0] == summaries[1]
    found, expected = (
        {path.relative_to(top).as_posix() for path in top.rglob("*")} for top in (out, whole)
    )
    assert {name for name in found if not name.startswith("previous-")} == expected
    assert not [name for name in found if "writing" in Path(name).name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Operation]]:
    """Return the folder of an undisturbed run, and its operations."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, undisturbed_run(out)


@pytest.mark.parametrize(("kind", "most"), [("killed", 99), ("killed in a write", 99)])
def test_a_run_that_is_killed_anywhere_continues_bit_for_bit(
    undisturbed: tuple[Path, list[Operation]], tmp_path: Path, kind: str, most: int
) -> None:
    whole, operations = undisturbed
    for at in places(operations, kind, most):
        out = tmp_path / str(at)
        with pytest.raises(Killed):
            tried(out, FAULTS[kind](at))
        assert finished(out).exit_code == 0
        assert_equal(whole, out)


@pytest.mark.parametrize("kind", [k for k in FAULTS if k.split()[0] in ("disk", "error", "folder")])
def test_a_failing_operation_names_the_file_and_the_last_good_checkpoint(
    undisturbed: tuple[Path, list[Operation]], tmp_path: Path, kind: str
) -> None:
    whole, operations = undisturbed
    for at in places(operations, kind):
        fault, out = FAULTS[kind](at), tmp_path / str(at)
        try:
            tried(out, fault)
        except OSError as error:
            check_message(error, fault, out)
        else:
            # Only where nothing is lost: the folder is there already, or the run has ended.
            assert fault.hit is not None
            assert fault.hit.name == "mkdir" or at >= len(operations) - 3, fault.hit
        if fault.once is None and (out / ".lock").exists() and not (out / "summary.json").exists():
            assert finished(out).exit_code == 0
            assert_equal(whole, out)


def check_message(error: OSError, fault: Fault, out: Path) -> None:
    """Check that an error names a file of the run, and what the run can be resumed from."""
    assert fault.hit is not None
    if fault.once is not None and fault.hit.number >= ENTERED:
        assert isinstance(error, RunFolderLost), fault.hit
        assert str(error.filename) == str(out)
        return
    assert Path(error.filename).is_relative_to(out), fault.hit
    if fault.once is not None or fault.hit.number < ENTERED:
        return
    assert fault.error == error.errno
    found = find_latest(out / "checkpoints").path
    known = "there is no checkpoint yet" if found is None else f"good checkpoint is {found.name}"
    assert known in str(error.strerror), fault.hit


def test_a_resume_that_is_killed_anywhere_continues_bit_for_bit(
    undisturbed: tuple[Path, list[Operation]], tmp_path: Path
) -> None:
    whole, _ = undisturbed
    half = tmp_path / "half"
    with pytest.raises(Killed):
        tried(half, FAULTS["killed"](40))
    counted = Path(shutil.copytree(half, tmp_path / "counted"))
    for at in places(undisturbed_run(counted, resume=True), "killed", 20):
        out = Path(shutil.copytree(half, tmp_path / str(at)))
        with pytest.raises(Killed):
            tried(out, FAULTS["killed"](at), resume=True)
        finished(out)
        assert_equal(whole, out)


def test_a_run_that_is_killed_as_it_stops_ends_at_the_same_step(tmp_path: Path) -> None:
    def program() -> FakeProgram:
        return FakeProgram(stop_at=3)

    stopped = tmp_path / "stopped"
    with FileOperations(stopped).installed() as operations:
        run(stopped, short(program()))
    for at in range(len(operations.seen) - 35, len(operations.seen)):
        out = tmp_path / str(at)
        with pytest.raises(Killed):
            tried(out, FAULTS["killed"](at), program())
        ended = (out / "summary.json").exists()
        resume = find_latest(out / "checkpoints").path is not None
        summary = tried(out, Fault(), program(), resume=resume)
        if ended:  # it was told, so resuming goes on
            assert (summary.reason, summary.steps) == ("finished", 5)
        else:
            assert (summary.reason, summary.message, summary.steps) == ("stopped", "enough", 4)
            assert_equal(stopped, out)


def contents(top: Path) -> dict[str, bytes]:
    """Return the files of a run by the end of their path, without those that tell of its folder."""
    return {
        path.relative_to(top).as_posix(): path.read_bytes()
        for path in top.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_that_is_moved_aside_is_whole_wherever_that_is_killed(
    undisturbed: tuple[Path, list[Operation]], tmp_path: Path
) -> None:
    whole, _ = undisturbed
    before = contents(whole)
    counted = Path(shutil.copytree(whole, tmp_path / "counted"))
    operations = undisturbed_run(counted, overwrite=True)
    assert contents(counted / "previous-1") == before
    end = next(
        one.number for one in operations if one.path == "events.jsonl" and one.name == "open"
    )
    for at in range(end + 1):
        out = Path(shutil.copytree(whole, tmp_path / str(at)))
        with pytest.raises(Killed):
            tried(out, FAULTS["killed"](at), overwrite=True)
        if (out / ".previous-1.moving").exists():
            # The move that was begun is finished, before anything else.
            with pytest.raises(NoCheckpoint):
                run(out, resume=True)
            tried(out, Fault())
        else:
            tried(out, Fault(), overwrite=True)
        assert contents(out / "previous-1") == before
        assert_equal(whole, out)


def test_an_accepted_run_that_is_killed_anywhere_is_accepted_or_asks_again(tmp_path: Path) -> None:
    made = tmp_path / "made"
    tried(made, Fault(), Changing("before"), stop_after=3)
    for at in range(0, 40, 2):
        out = Path(shutil.copytree(made, tmp_path / str(at)))
        with pytest.raises(Killed):
            tried(out, FAULTS["killed"](at), Changing("after"), resume=True, accept=True)
        try:
            summary = tried(out, Fault(), Changing("after"), resume=True)
        except ChangedRun:
            summary = tried(out, Fault(), Changing("after"), resume=True, accept=True)
        assert (summary.reason, summary.steps) == ("finished", 5)


def test_a_time_of_day_that_jumps_back_changes_only_times(
    undisturbed: tuple[Path, list[Operation]], tmp_path: Path
) -> None:
    whole, operations = undisturbed
    fault = FAULTS["clock set back"](len(operations) // 2)
    tried(tmp_path, fault)
    assert_equal(whole, tmp_path)
    times = [record["time"] for record in read_jsonl(tmp_path / "events.jsonl")]
    assert times != sorted(times)
    assert abs(time.time() - times[0]) < 3600
