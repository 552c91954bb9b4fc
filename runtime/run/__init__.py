"""A run: loop, signals of the process, live display, summary."""
