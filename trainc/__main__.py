"""`python -m trainc` is the `trainc` command."""

from trainc.cli.entry import main

if __name__ == "__main__":
    main()
