"""Who is late, in which words, what the variables of a launcher say, and how a process of several ends."""

import subprocess
import sys

import pytest

from trainc.runtime.processes.launch import WrongLaunch, find_launch
from trainc.runtime.processes.replica_group import ReplicaLost
from trainc.runtime.processes.watch import (
    Place,
    describe_late,
    follows_from_another,
    late_ranks,
)

TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("places", "late"),
    [
        ([Place(5), Place(4, waits=True), Place(5)], [1]),  # behind the others
        (
            [Place(5, waits=True), Place(5), Place(5, waits=True)],
            [1],
        ),  # the one that waits for none
        ([Place(5), Place(5, code="model.py:3 in forward")], [1]),  # in the user's own code
        ([Place(5, waits=True), Place(5, waits=True)], [0, 1]),  # nobody knows
    ],
)
def test_the_rank_that_the_others_wait_for_is_late(places: list[Place], late: list[int]) -> None:
    assert late_ranks(places) == late


def test_what_is_said_of_a_late_rank() -> None:
    places = [Place(5, "waiting", 31.0), Place(4, "running step 7", 30.4, "model.py:3 in forward")]
    text = describe_late([1], places, 30.0, {})
    assert text.startswith(
        "rank 1 has been running step 7 for 30 seconds, at model.py:3 in forward;"
    )
    text = describe_late([1], places, 30.0, {1: 12.0})
    assert "no sign of life for 12 seconds, and was running step 7 before that" in text


def test_the_variables_of_torchrun_are_read() -> None:
    launch = find_launch({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "3"})
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launch.restarts) == (2, 4, 0, 3)
    assert find_launch({}) is None
    assert find_launch({"WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 4, but MASTER_ADDR is not set"),
        ({"RANK": ""}, "but RANK is not set"),
        ({"RANK": "4"}, "RANK is 4, and WORLD_SIZE is 4: expected 0 to 3"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': expected a whole number"),
    ],
)
def test_variables_that_do_not_fit_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(WrongLaunch, match=message):
        find_launch(TORCHRUN | change)


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
            True,
        ),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp: unhandled system error"), True),
        (ReplicaLost("rank 0 waited for the other replicas"), True),
        (RuntimeError("expect_autograd_hooks_ INTERNAL ASSERT FAILED"), False),
        (ConnectionResetError("the user's own data base"), False),
        (ValueError("gloo/"), False),
    ],
)
def test_an_error_of_a_lost_connection_is_told_from_others(error: Exception, follows: bool) -> None:
    assert follows_from_another(error) == follows


def test_a_process_ends_with_its_code_after_what_was_registered_for_its_end() -> None:
    text = (
        "import atexit, threading; from trainc.runtime.processes.launch import end_process;"
        " threading.Thread(target=threading.Event().wait).start();"
        " atexit.register(print, 'registered'); print('last', end=' '); end_process(143)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", text], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (143, "last registered\n"), done.stderr
