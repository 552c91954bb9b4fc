"""The `trainc` script: `check` reads its own arguments, all other verbs use the command-line framework."""

import sys


def main() -> None:
    """Run the command line and exit."""
    if sys.argv[1:2] == ["check"]:
        import gc

        # Checking takes a tenth of a second and nearly all it makes stays in use: a collector only costs time.
        gc.disable()
        from trainc.cli.check import check_quickly
        from trainc.cli.failures import FAILURES, exit_code

        try:
            code = check_quickly(sys.argv[2:])
            sys.stdout.flush()  # here, where a closed pipe can still be said
        except FAILURES as error:
            code = exit_code(error)
        if code is not None:
            sys.exit(code)
        gc.enable()
    from trainc.cli.app import main as command_line

    command_line()
