"""What the `trainc` script runs: the plain `trainc check FILE` at once, everything else by the command line."""

import sys


def main() -> None:
    """Run the command line and exit."""
    if sys.argv[1:2] == ["check"]:
        from trainc.cli.check import quick

        code = quick(sys.argv[2:])
        if code is not None:
            sys.exit(code)
    from trainc.cli.app import main as command_line

    command_line()
