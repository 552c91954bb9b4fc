"""A process that a starter forks is as one that Python starts: what it is given, how it ends, what it writes."""

import os
import signal
from pathlib import Path

import pytest

from tests.forks import Forked, fork
from tests.processes import NotEnded, ended, environment


def run(folder: Path, text: str, ranks: int = 1) -> list[Forked]:
    file = folder / "file.py"
    file.write_text(text)
    return fork([[str(file), str(rank)] for rank in range(ranks)], environment())


TELL = """
import os, sys
words = [*sys.argv[1:], __name__, os.getcwd(), os.getsid(0) == os.getpid(), hash("some words")]
print(*words, os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0].rpartition(":")[2], file=sys.stderr)
sys.exit(3 + int(sys.argv[1]))
"""


def test_it_has_its_arguments_and_is_a_session_of_its_own_with_hashes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = run(tmp_path, TELL, ranks=2)
    told = [error.split() for _, error in ended(started, 60)]
    assert [process.returncode for process in started] == [3, 4]
    name = "test_it_has_its_arguments_and_is_a_session_of_its_own_with_hashes_of_its_own"
    for rank, (*words, hashed, test) in enumerate(told):
        assert words == [str(rank), "__main__", str(tmp_path), "True"]
        assert test == name
        assert int(hashed)
    assert told[0][-2] != told[1][-2]
    again = run(tmp_path, TELL)
    assert ended(again, 60)[0][1].split() == told[0]
    assert again[0].pid != started[0].pid


@pytest.mark.parametrize(
    ("text", "code", "written"),
    [
        ("", 0, ""),
        ("raise ValueError('some reason')", 1, "ValueError: some reason"),
        ("import sys; sys.exit('some words')", 1, "some words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os.write(2, b'as it is'); os._exit(7)", 7, "as it is"),
    ],
    ids=["plain", "error", "exit with words", "killed", "left at once"],
)
def test_it_ends_as_it_would(tmp_path: Path, text: str, code: int, written: str) -> None:
    (process,) = run(tmp_path, text)
    ((_, error),) = ended([process], 60)
    assert process.returncode == code
    assert written in error
    assert bool(error) == bool(written)


def test_one_that_hangs_is_ended_and_says_where_it_was(tmp_path: Path) -> None:
    (process,) = run(tmp_path, "import time\ndef hanging():\n    time.sleep(600)\nhanging()\n")
    with pytest.raises(NotEnded, match="in hanging"):
        ended([process], 2)
    assert process.returncode == -signal.SIGABRT
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_another_environment_has_a_starter_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "some value")
    (process,) = run(
        tmp_path, "import os, sys; print(os.environ['SOME_VARIABLE'], file=sys.stderr)"
    )
    assert ended([process], 60) == [(None, "some value\n")]
