"""Errors that users can cause: a message and an exit code instead of a traceback."""

import sys

from trainc.dsl.text.errors import SpecError

FAILURES = (SpecError, OSError, KeyboardInterrupt)


def exit_code(error: BaseException) -> int:
    """Print the message of one of FAILURES and return the exit code; raise an error that is not the user's."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        if error.filename is None:
            raise error
        print(f"trainc: {error.filename}: {error.strerror}", file=sys.stderr)
    else:
        print(str(error).strip("\n"), file=sys.stderr)
    return 1
