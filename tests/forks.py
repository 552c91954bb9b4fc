"""Processes that run a Python file without the seconds that imports take: one that has imported everything forks them.

A file runs in a process of its own, as by `python -P FILE ARGUMENTS`. Each rank has a starter of its own, so that ranks
differ in what Python draws when it starts: the order of sets of strings, for one.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

IMPORTED = (
    "torch.distributed",
    "torch.export._trace",
    "torch.fx.experimental.validator",
    "torch._subclasses.schema_check_mode",
    "trainc.compiler.program.program",
    "trainc.dsl.resolve.resolver",
)
"""What a starter imports: what a first step of a program would."""
OF_A_TEST = ("PYTEST_CURRENT_TEST",)
"""Variables of the environment that may differ between the processes of one starter."""


class Forked:
    """A process that a starter forked, with those members of `subprocess.Popen` that tests use."""

    def __init__(self, starter: Starter, pid: int, errors: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._starter, self._errors, self._text = starter, errors, ""

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for the end; return what was written to stderr. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            answer = self._starter.answer(timeout)
            if answer is None:
                assert timeout is not None
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(answer)
        with suppress(FileNotFoundError):
            self._text = self._errors.read_text("utf-8", "replace")
            self._errors.unlink()
        return None, self._text

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Starter:
    """The client of a starting process, which forks one process at a time; it ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what is read ahead, `select` would not see
            env=environment,
            start_new_session=True,
        )
        self.last: Forked | None = None

    def start(self, command: Sequence[str], variables: Mapping[str, str]) -> Forked:
        """Fork a process that runs a file with arguments, in the present folder."""
        handle, errors = tempfile.mkstemp(suffix=".stderr")
        os.close(handle)
        folder = str(Path.cwd())
        request = {"command": command, "variables": variables, "cwd": folder, "errors": errors}
        self._pipe(self._process.stdin).write(json.dumps(request).encode() + b"\n")
        self.last = Forked(self, int(self.answer(None) or 0), Path(errors))
        return self.last

    def answer(self, timeout: float | None) -> bytes | None:
        """Return the next line from the starting process; None where there is none for so many seconds."""
        output = self._pipe(self._process.stdout)
        if not select.select([output], [], [], timeout)[0]:
            return None
        line = output.readline()
        if not line:
            raise ChildProcessError("the process that starts others has ended")
        return line

    @property
    def is_free(self) -> bool:
        """Whether the process that was forked last has ended."""
        return self._process.poll() is None and (
            self.last is None or self.last.returncode is not None
        )

    def close(self) -> None:
        """End the starting process."""
        if not self.is_free:
            self._process.kill()
        self._process.communicate()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


_starters: dict[int, Starter] = {}


def fork(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[Forked]:
    """Run each of these, a file with arguments, as a process with this environment."""
    variables = {name: environment[name] for name in OF_A_TEST if name in environment}
    rest = {name: value for name, value in environment.items() if name not in OF_A_TEST}
    for rank in range(len(commands)):
        starter = _starters.get(rank)
        if starter is not None and not (starter.is_free and starter.environment == rest):
            starter.close()
            starter = None
        _starters[rank] = starter or Starter(rest)  # they import side by side
    return [_starters[rank].start(command, variables) for rank, command in enumerate(commands)]


@atexit.register
def _close() -> None:
    for starter in _starters.values():
        starter.close()


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    threads = len([*Path("/proc/self/task").glob("*")])  # 0 where the system does not tell
    assert threads <= 1, f"only a process of one thread may fork, and this one has {threads}"
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _run(request)
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _run(request: Any) -> NoReturn:
    """Be the process that was asked for."""
    code: Any = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        errors = os.open(request["errors"], os.O_WRONLY | os.O_APPEND)
        for own, put in ((0, nothing), (1, nothing), (2, errors)):
            os.dup2(put, own)
        os.chdir(request["cwd"])
        os.environ.update(request["variables"])
        sys.argv = list(request["command"])
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
    os._exit(0)  # without what libraries say of memory they leave
