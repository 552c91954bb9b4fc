"""Replicas that leave and join by torchft itself, each a process, with a lighthouse."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler.constructs.test_local_membership import simulated
from tests.compiler.elastic_replicas import LIMIT, SPECS, finished, lighthouse, read, start
from tests.compiler.elastic_replicas import __file__ as replicas_file
from tests.processes import run_processes

pytest.importorskip("torchft", reason="torchft is not installed")
pytestmark = [pytest.mark.models, pytest.mark.slow]


def ran(case: str, folder: Path, codes: tuple[int, ...], least: int = 1) -> list[Any]:
    """Run a case in as many replicas as there are exit codes; return what those found that ended with 0."""
    with lighthouse(least) as address:
        finished([start(case, n, folder, address) for n in range(len(codes))], codes)
    return [read(folder, n) for n, code in enumerate(codes) if code == 0]


def near(found: Any, expected: Any, steps: range) -> None:
    for step in steps:
        for name, value in found["weights"][step].items():
            torch.testing.assert_close(value, expected[step][name], rtol=1e-12, atol=1e-12)


def same(one: Any, other: Any, step: int) -> bool:
    pair = one["weights"][step], other["weights"][step]
    return all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())


def test_where_nobody_leaves_every_bit_is_that_of_fixed_replicas(tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir()
    fixed = run_processes(replicas_file, 2, tmp_path / "fixed", timeout=LIMIT, weights_only=False)
    elastic = ran("stays", tmp_path, (0, 0), least=2)
    for number in range(2):
        for name in SPECS:
            ours, theirs = elastic[number][name], fixed[number][name]
            assert all(same(ours, theirs, step) for step in range(1, 8)), (name, number)
            assert ours["metrics"][6]["local.replicas"] == 2
            for step in range(1, 8):
                assert ours["metrics"][step]["loss"] == theirs["metrics"][step]["loss"]


def test_the_others_go_on_where_one_is_killed_between_turns(tmp_path: Path) -> None:
    first, second = ran("dies_between", tmp_path, (0, 0, 9), least=2)
    assert same(first, second, 3)
    assert same(first, second, 6)
    assert [first["metrics"][step]["local.replicas"] for step in (3, 6)] == [3, 2]
    assert "local: 2 replicas in the turn after step 6, and 3 before" in first["notes"]


def test_one_killed_in_a_turn_changes_nothing_and_rejoins(tmp_path: Path) -> None:
    with lighthouse(2) as address:
        three = [start("dies_in_turn", n, tmp_path, address) for n in range(3)]
        try:
            three[1].wait(LIMIT)
            again = start("dies_in_turn", 1, tmp_path, address, "again", name="again")
        finally:
            finished([three[0], three[2]], (0, 0))
        finished([three[1], again], (9, 0))
    first, last, late = (read(tmp_path, name) for name in (0, 2, "again"))
    expected = simulated({3: (0, 1, 2)}, outer=True, last=6)
    near(first, expected[0], range(1, 7))  # the turn after step 6 is as if it were not
    assert first["metrics"][6]["local.replicas"] == 0
    assert first["metrics"][9]["local.replicas"] == 2
    (failed,) = (note for note in first["notes"] if "failed" in note)
    assert failed.startswith(
        "local: the meeting after step 6 failed, and this replica goes on as it was: "
    )
    joined = min(late["weights"]) - 1
    assert first["metrics"][joined]["local.replicas"] == 2  # its weights do not count in this turn
    step = joined + 3
    assert same(first, late, step)
    assert same(first, last, step)
    assert [one["metrics"][step]["local.replicas"] for one in (first, last, late)] == [3, 3, 3]
    told = f"goes on with the state of one that has done {joined} steps"
    assert told in late["notes"][0]


def test_a_replica_of_another_spec_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    first, second, refused = ran("differs", tmp_path, (0, 0, 0), least=2)
    assert same(first, second, 3)
    assert first["metrics"][3]["local.replicas"] == 2
    assert "sgd" in refused


def wait(path: Path, one: subprocess.Popen[str]) -> None:
    while not path.exists() and one.poll() is None:
        time.sleep(0.02)


def test_training_goes_on_without_the_lighthouse(tmp_path: Path) -> None:
    with lighthouse(1) as address:
        one = start("alone", 0, tmp_path, address)
        try:
            wait(tmp_path / "end lighthouse", one)
        except BaseException:
            one.kill()
            raise
    (tmp_path / "ended").touch()
    try:
        wait(tmp_path / "start lighthouse", one)
        with lighthouse(1, int(address.rsplit(":", 1)[1])):
            (tmp_path / "started").touch()
            finished([one], (0,))
    finally:
        one.kill()
    found = read(tmp_path, 0)
    assert [found["metrics"][step]["local.replicas"] for step in (3, 6, 9)] == [1, 0, 1]
    assert sum("the meeting after step 6 failed" in note for note in found["notes"]) == 1
