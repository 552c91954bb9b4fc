"""Errors that users can cause: a message and an exit code instead of a traceback.

Only code of the user's own shows its traceback, from its own first frame. With TRAINC_TRACEBACK=1 every error shows
the whole of it.
"""

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType

from trainc.dsl.text.errors import CompilerBug, SpecError

MISTAKE, INTERRUPTED, BROKEN_PIPE = 1, 130, 141
FAILURES = (Exception, KeyboardInterrupt)
# What says what is wrong; any other error in trainc's own code is its mistake.
_MESSAGES = (SpecError, OSError, ValueError, RuntimeError, TypeError)
_COMMAND_LINE = {"click", "typer"}


def exit_code(error: BaseException) -> int:
    """Print the message of an error and return the exit code; raise an error that is a mistake in trainc."""
    if os.environ.get("TRAINC_TRACEBACK") == "1":
        raise error
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, CompilerBug) or type(error).__module__.partition(".")[0] in _COMMAND_LINE:
        raise error
    own = _own_traceback(error)
    if not isinstance(error, _MESSAGES) and not own:
        raise error
    text = _message(error, bool(own))
    if own:
        text = "".join(own).strip("\n") + f"\n{text}"
    if os.environ.get("RANK", "") and os.environ.get("WORLD_SIZE", "1") != "1":
        text = _of_this_rank(error, text)
    if text:
        print(text, file=sys.stderr)
    return MISTAKE


def _of_this_rank(error: BaseException, text: str) -> str:
    """Return a message with the name of the process that says it; nothing where another of them says the same."""
    from trainc.runtime.processes.launch import first_to_say
    from trainc.runtime.processes.watch import OtherRankFailed

    if isinstance(error, OtherRankFailed):
        text = text if first_to_say(f"failed: {error.rank}") else ""
        return text
    return f"rank {os.environ.get('RANK')}:\n{text}" if first_to_say(text) else ""


def _message(error: BaseException, own: bool) -> str:
    if isinstance(error, SpecError):
        return str(error).strip("\n")
    if isinstance(error, OSError) and error.filename is not None:
        return f"trainc: {error.filename}: {error.strerror}"
    if own:
        return f"trainc: your code raised {type(error).__name__}; the traceback above begins with its first line"
    return f"trainc: {str(error) or type(error).__name__}"


def _own_traceback(error: BaseException) -> list[str]:
    """Return the traceback of the error that the user's own code raised, from its first frame; empty without one."""
    import traceback

    for one in _chain(error):
        if isinstance(one, SpecError):
            continue
        trace = one.__traceback__
        while trace is not None and not _is_users(trace):
            trace = trace.tb_next
        if trace is not None:
            return traceback.format_exception(type(one), one, trace, chain=False)
    return []


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield what caused an error, the first cause first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__  # type: ignore[assignment]  # None ends the loop
    yield from reversed(found)


def _is_users(trace: TracebackType) -> bool:
    """Say whether a frame is of code that is neither trainc nor installed."""
    name = trace.tb_frame.f_code.co_filename
    path = Path(name)
    if name.startswith("<") or not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return False
    return not any(path.is_relative_to(place) for place in _installed())


@cache
def _installed() -> tuple[Path, ...]:
    """Return the folders of Python and of trainc's own packages."""
    import sysconfig

    import trainc

    own = Path(trainc.__file__).parents[1]
    packages = (own / "trainc", own / "dsl", own / "kernels", own / "runtime", own / "compiler")
    paths = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    return (*map(Path, paths), *packages)
